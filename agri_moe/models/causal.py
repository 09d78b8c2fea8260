"""A Hugging Face causal language model that stops before its head.

The losses read hidden states and the head's weight, never logits of shape [tokens, vocabulary]. They are computed
inside this module's forward: under FSDP2 it is the root, and only there is a tied head whole and its gradient reduced.

Shapes: B batch, T sequence, N chosen positions, S sampled positions, D width, V vocabulary, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

R = TypeVar("R")


class Forward(NamedTuple, Generic[R]):
    """What a forward pass returns."""

    read: R  # what `read` made of hidden states and head
    layers: list[Tensor]  # one [S, D] per asked-for layer
    router_logits: list[Tensor]  # one [B*T, E] per MoE layer, first layer first


class CausalModel(nn.Module):
    """Backbone, chosen positions, head.

    Args:
        hf: Any causal model with `.model` (the backbone, with `.layers`) and `.lm_head`, as Qwen, Llama, Mistral and
            their MoE forms have.
    """

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.hf.model.layers)

    @property
    def routers(self) -> list[Any]:
        """The routers of the MoE layers, first layer first; empty for a dense model."""
        return [layer.mlp.gate for layer in self.hf.model.layers if hasattr(layer.mlp, "experts")]

    @property
    def num_experts(self) -> int:
        """Experts per MoE layer; 0 for a dense model."""
        return self.routers[0].num_experts if self.routers else 0

    @property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        return self.routers[0].top_k if self.routers else 0

    def forward(
        self,
        batch: dict[str, Tensor],
        positions_N: Tensor,
        read: Callable[[Tensor, Tensor], R],
        layers: Sequence[int] = (),
    ) -> Forward[R]:
        """Run the backbone on a packed batch and hand hidden states and head to `read`.

        Args:
            batch: `input_ids` and `position_ids` [B, T] (positions restart at each packed row); `sample` [S] if
                `layers` are asked for.
            positions_N: Flat indices b T + t of the positions that `read` sees.
            read: Takes (hidden_ND, head_VD).
            layers: Layers whose residual stream after the layer is returned at `batch["sample"]`.
        """
        backbone = self.hf.model
        routers = self.routers
        with capture([*routers, *(backbone.layers[i] for i in layers)]) as outputs:
            # No attention mask and no cache: transformers then derives the block mask of packed rows from
            # position_ids. With a cache, or a mask of ones, rows would see their neighbours.
            hidden_BTD = backbone(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
        streams = [out.flatten(0, 1)[batch["sample"]] for out in outputs[len(routers) :]]
        result = read(hidden_BTD.flatten(0, 1)[positions_N], self.hf.lm_head.weight)
        return Forward(result, streams, outputs[: len(routers)])


@contextmanager
def capture(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect the first output of each module during one forward pass, in the order given.

    The hooks are gone when the block ends, so the second run that activation checkpointing makes in the backward pass
    is not counted.
    """
    outputs: list[Any] = []
    by_module: dict[int, Any] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        by_module[id(module)] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
        outputs.extend(by_module[id(module)] for module in modules)
    finally:
        for handle in handles:
            handle.remove()


def shard(model: CausalModel, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shard over a mesh with FSDP2: each layer by itself, then the rest with the head, whose forward holds the loss.

    Args:
        model: Changed in place; its parameters become shards.
        mesh: One-dimensional.
        dtype: Type in which parameters are gathered and used; None keeps their own. Gradients are reduced in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    def placement(parameter: nn.Parameter) -> Shard:
        # Fused experts [E, 2F, D]: there are fewer experts than ranks on large jobs, and empty shards on the rest.
        return Shard(1 if parameter.ndim == 3 else 0)

    for layer in model.hf.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def start_rows(model: PreTrainedModel, pieces: dict[int, list[int]]) -> None:
    """Start the embedding rows of new tokens as the mean of the rows of their plain-text pieces, in place.

    Where the padded matrix has free rows, as Qwen's does, it does not grow; otherwise it grows to the next multiple of
    128.

    Args:
        model: Its input embedding and, if untied, its head are changed.
        pieces: Id of each new token -> ids of its pieces.
    """
    if not pieces:
        return
    if max(pieces) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(pieces) + 1, pad_to_multiple_of=128, mean_resizing=False)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    with torch.no_grad():
        for weight_VD in matrices:
            for token, parts in pieces.items():
                weight_VD[token] = weight_VD[parts].float().mean(0).to(weight_VD.dtype)
