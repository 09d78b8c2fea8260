"""A Mixture-of-Experts whose experts share one FFN: what tells them apart is a low-rank change before and after it.

    expert_e(x) = B_e core(A_e x),    A_e = I + up_e down_e,    B_e likewise with matrices of its own

Multiplied out, gate and up of an expert are those of the core times A_e, and its down is B_e times the core's: a stock
Qwen3-MoE with the same logits (`multiplied_out`). transformers knows neither model type nor weights of the small
format; importing this module makes its Auto classes read them.

Shapes: N tokens, K experts per token, P = N K pairs of both, D model width, F expert width, R rank, E experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers import initialization as init
from transformers.initialization import no_init_weights
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

CORE, INPUT, OUTPUT = "shared_core", "input_wrapper", "output_wrapper"


@strict
class SharedCoreConfig(Qwen3MoeConfig):
    """Qwen3-MoE's config, and the rank of the wrappers.

    Args:
        shared_core_rank: R; a multiple of 8, as grouped products on GPUs ask.
    """

    model_type = "qwen3_moe_shared_core"

    shared_core_rank: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse a rank that no kernel takes."""
        super().__post_init__(**kwargs)
        if self.shared_core_rank < 8 or self.shared_core_rank % 8:
            raise ValueError(f"shared_core_rank is {self.shared_core_rank}: it must be a positive multiple of 8.")


class Wrapper(nn.Module):
    """Identity plus low rank, one for each expert.

    Args:
        experts: E.
        width: D.
        rank: R.
    """

    def __init__(self, experts: int, width: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, rank, width))
        self.up = nn.Parameter(torch.empty(experts, width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LoRA begins: no change, and a gradient all the same."""
        init.normal_(self.down, mean=0.0, std=self.down.shape[-1] ** -0.5)
        init.zeros_(self.up)

    def forward(self, x_PD: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's change of its own tokens.

        Args:
            x_PD: Tokens in the order of their experts.
            ends_E: Where each expert's tokens end, int32.
        """
        kind, dtype = x_PD.device.type, self.down.dtype
        if torch.is_autocast_enabled(kind):  # autocast does not know grouped_mm
            dtype = torch.get_autocast_dtype(kind)
        low_PR = functional.grouped_mm(x_PD.to(dtype), self.down.to(dtype).transpose(1, 2), offs=ends_E)
        change_PD = functional.grouped_mm(low_PR, self.up.to(dtype).transpose(1, 2), offs=ends_E)
        return x_PD + change_PD.to(x_PD.dtype)

    def matrices(self) -> Tensor:
        """I + up down, [E, D, D] in float32."""
        change_EDD = self.up.float() @ self.down.float()
        return change_EDD + torch.eye(change_EDD.shape[-1], device=change_EDD.device)


class SharedCoreExperts(nn.Module):
    """What stands in the place of a stock layer's experts, and answers as they do.

    Args:
        config: Of the model.
    """

    def __init__(self, config: SharedCoreConfig):
        super().__init__()
        experts, width, rank = config.num_local_experts, config.hidden_size, config.shared_core_rank
        self.num_experts = experts
        self.input_wrapper = Wrapper(experts, width, rank)
        self.shared_core = Qwen3MoeMLP(config, intermediate_size=config.moe_intermediate_size)
        self.output_wrapper = Wrapper(experts, width, rank)
        self.act_fn = self.shared_core.act_fn

    def forward(self, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """[N, D]: the chosen experts' answers, weighted and added up."""
        tokens, top_k = experts_NK.shape
        chosen_P, order_P = experts_NK.flatten().sort(stable=True)
        every_E = torch.arange(self.num_experts, device=chosen_P.device)
        ends_E = torch.searchsorted(chosen_P, every_E, right=True).int()
        x_PD = self.input_wrapper(hidden_ND[order_P // top_k], ends_E)
        y_PD = self.output_wrapper(self.shared_core(x_PD), ends_E)
        weighted_PD = y_PD * weights_NK.flatten()[order_P, None]
        # Back in the tokens' order and summed there: adding into place would not be deterministic on GPUs.
        by_token_NKD = weighted_PD[order_P.argsort()].view(tokens, top_k, -1)
        return by_token_NKD.sum(1).to(hidden_ND.dtype)

    # What stock experts hold as parameters, for all that looks at experts one by one.

    @property
    def gate_up_proj(self) -> Tensor:
        """Gate above up of each expert, [E, 2F, D] in the parameters' type."""
        core = self.shared_core
        gate_up = torch.cat([core.gate_proj.weight, core.up_proj.weight])
        return (gate_up.float() @ self.input_wrapper.matrices()).to(gate_up.dtype)

    @property
    def down_proj(self) -> Tensor:
        """Down of each expert, [E, D, F] in the parameters' type."""
        down = self.shared_core.down_proj.weight
        return (self.output_wrapper.matrices() @ down.float()).to(down.dtype)


class SharedCoreForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE with `SharedCoreExperts`.

    Args:
        config: Of the model.
    """

    config_class = SharedCoreConfig

    def __init__(self, config: SharedCoreConfig):
        # The stock experts are made without values, which costs no memory, and let go.
        with no_init_weights():
            super().__init__(config)
        for layer in sparse_layers(self):
            layer.mlp.experts = SharedCoreExperts(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Wrapper):
            module.reset_parameters()


def sparse_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers that have experts; Qwen3-MoE may keep some of them dense."""
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def shared_core_config(source: Qwen3MoeConfig, rank: int) -> SharedCoreConfig:
    """The config of a model in the small format."""
    values = source.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    return SharedCoreConfig(**values, shared_core_rank=rank, architectures=[SharedCoreForCausalLM.__name__])


def multiplied_out(model: SharedCoreForCausalLM) -> Qwen3MoeForCausalLM:
    """The stock model with the same logits up to rounding, in the same type and on the CPU; in eval mode."""
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "shared_core_rank"):
        values.pop(key, None)
    config = Qwen3MoeConfig(**values, architectures=[Qwen3MoeForCausalLM.__name__])
    with no_init_weights():
        stock = cast(Any, AutoModelForCausalLM).from_config(config, dtype=model.dtype)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.experts." not in name}
    stock.load_state_dict(state, strict=False)
    with torch.no_grad():
        for ours, theirs in zip(sparse_layers(model), sparse_layers(stock), strict=True):
            theirs.mlp.experts.gate_up_proj.copy_(ours.mlp.experts.gate_up_proj)
            theirs.mlp.experts.down_proj.copy_(ours.mlp.experts.down_proj)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return cast(Qwen3MoeForCausalLM, stock.eval())


AutoConfig.register(SharedCoreConfig.model_type, SharedCoreConfig)
AutoModelForCausalLM.register(SharedCoreConfig, SharedCoreForCausalLM)
