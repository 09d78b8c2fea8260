"""Other ways for a stock mixture to choose its experts, in training: the model keeps its parameters and their names.

Every router (`gate`) gets another `forward`, which answers as the stock one does: logits, weights, chosen experts. What
the experts do with them stays transformers' own, so that autocast, sharding and shared cores go on as they do without.
Only where experts choose, the block around them gets another `forward` too.

Shapes: B batch, T sequence, N tokens, D width, E experts, K experts per token, A assignments, L layers with experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from agri_moe.data.chat import Segment
from agri_moe.models.moe import RoutingKind, RoutingRule, assign, normalised, within_capacity
from agri_moe.models.upcycle import is_moe
from agri_moe.schedules import Value, bounds, value_at

POSITIONS = "token_positions"
STATE = "model.routing."
"""Where a checkpoint of a language module has the state of `Routers`."""


@dataclass
class RoutingConfig:
    """How the routers of a stock mixture choose in training; the defaults choose as the stock model does.

    Schedules count the optimizer steps of the run. Statistics, balance loss and router-z see the logits over the
    temperature, without noise and bias; the load that is reported is what experts really worked on.

    Args:
        kind: `token_choice`, or `expert_choice` (Zhou et al. 2022, arXiv:2202.09368) for studies of training: each
            expert takes as many tokens as it has room for, in evaluation too. No stock model has it, so such a run is
            not exported.
        temperature: What the logits are divided by. Its value at the end of a run goes into the exported router.
        noise: Added to the logits over the temperature, in training, where experts are chosen and not where their
            answers are weighted: `gaussian` of standard deviation `noise_scale`, or `gumbel` times it. Gumbel noise at
            scale 1 is stochastic routing: K experts drawn without replacement in proportion to their probabilities
            (Kool et al. 2019, arXiv:1903.06059).
        noise_scale: A number or a schedule; 0 is no noise.
        drop: Let an expert refuse tokens beyond its room, in training: those that it is least probable for, over all
            tokens of the micro-batch (Riquelme et al. 2021, arXiv:2106.05974).
        capacity_factor: Room of each expert over its even share of a micro-batch's tokens, for `drop` and
            `expert_choice`.
        bias_update_rate: Balance without a loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1, at 0.001 there):
            after each optimizer step an expert's bias, which is added to its probability in the choice alone, goes up
            by this where its load was below the mean, and down where it was above. 0 is off. Set
            `objective.balance.weight` to 0 beside it, or the loss does the work.
        bias_anneal_steps: Over so many steps at the end of the run the biases go linearly to 0, so that what is
            exported is what was trained. A stock router has no place for a bias that is left.
    """

    kind: RoutingKind = "token_choice"
    temperature: Value = 1.0
    noise: Literal["none", "gaussian", "gumbel"] = "none"
    noise_scale: Value = 1.0
    drop: bool = False
    capacity_factor: float = 1.25
    bias_update_rate: float = 0.0
    bias_anneal_steps: int = 0

    def check(self, config: PreTrainedConfig, model_key: str) -> None:
        """Find what cannot be, or does not fit the model.

        Args:
            config: Of the model that is trained.
            model_key: The setting that names it, for messages.

        Raises:
            ValueError: If something is.
        """
        if not is_moe(config):
            raise ValueError(f"model.routing is about experts, and {model_key} has none: leave it out.")
        if not isinstance(config, Qwen3MoeConfig | MixtralConfig):
            raise ValueError(
                f"model.routing: {model_key} is a {config.model_type}, whose routers are not known here: train a "
                "qwen3_moe or a mixtral, or leave it out."
            )
        for key, value, holds, demand in (
            ("temperature", self.temperature, bounds(self.temperature)[0] > 0, "above 0"),
            ("noise_scale", self.noise_scale, bounds(self.noise_scale)[0] >= 0, "at least 0"),
            ("capacity_factor", self.capacity_factor, self.capacity_factor > 0, "above 0"),
            ("bias_update_rate", self.bias_update_rate, self.bias_update_rate >= 0, "at least 0"),
            ("bias_anneal_steps", self.bias_anneal_steps, self.bias_anneal_steps >= 0, "at least 0"),
        ):
            if not holds:
                raise ValueError(f"model.routing.{key} is {value}: it must be {demand}.")
        self._check_together()

    def _check_together(self) -> None:
        chosen = self.kind == "expert_choice"
        if chosen and self.drop:
            raise ValueError("model.routing.drop is for token_choice; with expert_choice every expert is full anyway.")
        if chosen and self.bias_update_rate:
            raise ValueError(
                "model.routing.bias_update_rate is for token_choice; with expert_choice the load is even anyway."
            )
        if self.bias_anneal_steps and not self.bias_update_rate:
            raise ValueError(
                "model.routing.bias_anneal_steps needs bias_update_rate above 0: there is no bias to let go."
            )

    def check_steps(self, steps: int) -> None:
        """Refuse to let biases go over more steps than the run has."""
        if self.bias_anneal_steps > steps:
            raise ValueError(
                f"model.routing.bias_anneal_steps is {self.bias_anneal_steps}, and the run has {steps} steps: "
                "it must be at most as many."
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint has to say beside the state of `Routers`, in types that load without running code."""
        return {"kind": self.kind, "capacity_factor": self.capacity_factor}


class Routers(nn.Module):
    """The routers of a model, made to choose in another way; and what they keep: the temperature, and the biases.

    Args:
        hf: A model that `RoutingConfig.check` has nothing against; its blocks are changed in place.
        config: How they choose.
        saved: Whether the state belongs into a state dict.
    """

    def __init__(self, hf: PreTrainedModel, config: RoutingConfig, saved: bool = True):
        super().__init__()
        blocks: list[Any] = [layer.mlp for layer in hf.model.layers if hasattr(layer.mlp, "experts")]
        gate = blocks[0].gate
        self.config = config
        self.rule = RoutingRule(config.kind, gate.top_k, config.capacity_factor, config.drop)
        self.num_experts: int = gate.num_experts
        self.temperature: Tensor
        # Not in the default type, which Lightning's bf16-true sets while it builds.
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32), persistent=saved)
        biases = torch.zeros(len(blocks), self.num_experts, dtype=torch.float32) if config.bias_update_rate else None
        self.bias_LE: Tensor | None
        self.register_buffer("bias_LE", biases, persistent=saved)
        self.begin_step(0)  # for what is validated before training
        self._asked: Tensor | None = None  # positions of the pass that is about to begin
        self._positions_N: Tensor | None = None  # of the last pass, which the backward pass may run again
        self._loads: dict[int, Tensor] | None = None
        for layer, block in enumerate(blocks):
            if config.kind == "expert_choice":
                block.gate.forward = partial(self._answer_logits, block.gate)
                block.forward = partial(self._experts_choose, layer, block)
            else:
                block.gate.forward = partial(self._tokens_choose, layer, block.gate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Routers":
        # `module.to(torch.bfloat16)`, Lightning's bf16-true, would round a bias to the next 1/256 of itself.
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    # ------------------------------------------------------------------ a training run

    def begin_step(self, step: int) -> None:
        """Take on what the schedules say of this optimizer step of the run, counted from 0."""
        self.temperature.fill_(value_at(self.config.temperature, step))
        self.noise_scale = value_at(self.config.noise_scale, step)

    @torch.no_grad()
    def end_step(self, chosen_LE: Tensor, remaining: int) -> None:
        """Move the biases.

        Args:
            chosen_LE: Assignments of the whole optimizer step, over all ranks, before any were dropped.
            remaining: Steps that the run has left, this one included.
        """
        if self.bias_LE is None:
            return
        if remaining <= self.config.bias_anneal_steps:
            self.bias_LE *= (remaining - 1) / remaining
        else:
            self.bias_LE += self.config.bias_update_rate * (chosen_LE.mean(-1, keepdim=True) - chosen_LE).sign()

    # ------------------------------------------------------------------ one forward pass of the model

    def expect(self, positions_N: Tensor) -> None:
        """Say which tokens of the next pass are no padding: that takes no room, and counts in no load."""
        self._asked = positions_N

    def begin_pass(self) -> None:
        """A pass that nobody announced, such as one of generation, has no padding that is known."""
        self._positions_N, self._asked = self._asked, None
        self._loads = None if self._positions_N is None else {}

    def end_pass(self) -> list[Tensor]:
        """For each layer, float32 [2, E]: assignments that were chosen, and those of them that were not dropped."""
        loads, self._loads = self._loads, None  # the second run that checkpointing makes is not counted
        assert loads is not None, "the pass was announced"
        return list(loads.values())

    def _logits(self, gate: Any, hidden: Tensor) -> tuple[Tensor, torch.dtype]:
        """[N, E] over the temperature, in float32 at least; and the type that the stock router has them in."""
        stock_NE = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        dtype = torch.promote_types(stock_NE.dtype, torch.float32)
        return stock_NE.to(dtype) / self.temperature, stock_NE.dtype

    def _noise(self, logits_NE: Tensor, training: bool) -> Tensor | None:
        """From torch's own generator: each step seeds it, and checkpointing sets it back to run a layer again."""
        if not training or self.config.noise == "none" or self.noise_scale == 0:
            return None
        if self.config.noise == "gaussian":
            return self.noise_scale * torch.randn_like(logits_NE)
        return -self.noise_scale * torch.empty_like(logits_NE).exponential_().log()

    def _tokens_choose(self, layer: int, gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What takes the place of the stock router's `forward`: logits [N, E], weights and experts [N, K]."""
        logits_NE, stock_dtype = self._logits(gate, hidden)
        p_NE = logits_NE.softmax(-1)
        noise_NE = self._noise(logits_NE, gate.training)
        score_NE = p_NE.detach() if noise_NE is None else (logits_NE.detach() + noise_NE).softmax(-1)
        choice_NE = score_NE if self.bias_LE is None else score_NE + self.bias_LE[layer]
        experts_NK = choice_NE.topk(gate.top_k, dim=-1).indices
        weights_NK = p_NE.gather(1, experts_NK)
        mixtral = isinstance(gate, MixtralTopKRouter)
        if mixtral or gate.norm_topk_prob:
            weights_NK = normalised(weights_NK)  # a bias may choose those whose probabilities have become 0
        kept_NK = torch.ones_like(score_NE).gather(1, experts_NK)
        if self.rule.drop and gate.training:
            kept_NK = self._kept(score_NE, experts_NK)
            weights_NK = weights_NK * kept_NK
        self._note(layer, experts_NK, kept_NK)
        return logits_NE, weights_NK if mixtral else weights_NK.to(stock_dtype), experts_NK

    def _kept(self, score_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """[N, K] 1 where an expert has room for the token; 0 elsewhere, and for all padding."""
        places = self._positions_N
        own_NE, own_NK = (score_NE, experts_NK) if places is None else (score_NE[places], experts_NK[places])
        _, kept_NE = within_capacity(own_NE, own_NK, self.rule.capacity(*own_NE.shape))
        if places is not None:
            kept_NE = torch.zeros_like(score_NE).index_copy(0, places, kept_NE)
        return kept_NE.gather(1, experts_NK)

    def _answer_logits(self, gate: Any, hidden: Tensor) -> tuple[Tensor]:
        """What takes the place of the stock router's `forward` where experts choose."""
        return (self._logits(gate, hidden)[0],)

    def _experts_choose(self, layer: int, block: Any, hidden_BTD: Tensor) -> Tensor:
        """What takes the place of the stock block's `forward`; padding, and tokens that nobody chooses, get zeros."""
        x_ND, places = hidden_BTD.flatten(0, 1), self._positions_N
        (logits_NE,) = block.gate(x_ND)
        own_ND, own_NE = (x_ND, logits_NE) if places is None else (x_ND[places], logits_NE[places])
        assignment = assign(own_NE, self.rule, self._noise(own_NE, block.training))
        if self._loads is not None:
            self._loads[layer] = assignment.load_E.float().expand(2, -1)
        experts_A = torch.arange(self.num_experts, device=x_ND.device).repeat_interleave(
            len(assignment.token_A) // self.num_experts  # places of one expert, as many for each
        )
        weighted_AD = block.experts(
            own_ND[assignment.token_A], experts_A[:, None], assignment.weight_A[:, None].to(x_ND.dtype)
        )
        answer_ND = torch.zeros_like(own_ND).index_add(0, assignment.token_A, weighted_AD.to(x_ND.dtype))
        if places is not None:
            answer_ND = torch.zeros_like(x_ND).index_copy(0, places, answer_ND)
        return answer_ND.view_as(hidden_BTD)

    def _note(self, layer: int, experts_NK: Tensor, kept_NK: Tensor) -> None:
        """Count a layer's assignments of tokens that are no padding."""
        if self._loads is None:
            return
        experts_A, kept_A = experts_NK[self._positions_N].flatten(), kept_NK[self._positions_N].flatten().float()
        both_A2 = torch.stack([torch.ones_like(kept_A), kept_A], -1)
        self._loads[layer] = kept_A.new_zeros(self.num_experts, 2).index_add(0, experts_A, both_A2).T


# ---- a model that was trained so


def restore(hf: PreTrainedModel, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Make a stock model, filled from a checkpoint, answer as it did in training; in place.

    The temperature goes into the routers' weights. A bias that makes no difference, because it is the same for all
    experts or all of them are chosen, goes nowhere. What else no stock model can hold is left to `Routers`.

    Args:
        hf: The model.
        facts: `RoutingConfig.facts` of the run.
        state: Of its `Routers`.
    """
    gates = [layer.mlp.gate for layer in hf.model.layers if hasattr(layer.mlp, "experts")]
    with torch.no_grad():
        for gate in gates:
            gate.weight /= state["temperature"]
    bias_LE = state.get("bias_LE")
    biased = bias_LE is not None and gates[0].top_k < gates[0].num_experts and bool((bias_LE != bias_LE[:, :1]).any())
    if facts["kind"] == "expert_choice":
        hf.routing = Routers(hf, RoutingConfig("expert_choice", capacity_factor=facts["capacity_factor"]), saved=False)
    elif biased:
        hf.routing = Routers(hf, RoutingConfig(bias_update_rate=1.0), saved=False)
        hf.routing.bias_LE.copy_(bias_LE)


def kept_routing(hf: PreTrainedModel) -> RoutingKind | None:
    """How a model from `restore` chooses, where no stock model does; `token_choice` is with a bias."""
    routers = getattr(hf, "routing", None)
    return routers.config.kind if isinstance(routers, Routers) else None


@torch.no_grad()
def leave_out_bias(hf: PreTrainedModel, ids_BT: Tensor) -> float:
    """Make a stock model of one that `restore` gave a bias; the share of its choices on these tokens that change."""
    before_LNK = _choices(hf, ids_BT)
    for layer in hf.model.layers:
        if hasattr(layer.mlp, "experts"):
            del layer.mlp.gate.forward
    del hf.routing
    same_LNKK = before_LNK[..., :, None] == _choices(hf, ids_BT)[..., None, :]
    return 1 - float(same_LNKK.any(-1).float().mean())


def _choices(hf: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """The experts of each token [L, N, K]."""
    found: list[Tensor] = []
    gates = [layer.mlp.gate for layer in hf.model.layers if hasattr(layer.mlp, "experts")]
    hooks = [gate.register_forward_hook(lambda _, __, output: found.append(output[2])) for gate in gates]
    hf(ids_BT)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def token_positions(batch: Mapping[str, Any]) -> Tensor:
    """Flat places of the tokens of a packed batch that are no padding; on the CPU, where it waits for no device."""
    positions_N: Tensor = (batch["segment_ids"].flatten() != Segment.PAD).nonzero()[:, 0]
    return positions_N
