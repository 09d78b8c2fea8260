"""FSDP2: models in pieces, one per rank, and values put there without any rank ever holding a model whole.

A model is built on the meta device, sharded, given empty memory for its pieces (`materialise`), and filled tensor by
tensor (`place`). transformers' own sharded loader is no help: it cuts gate and up apart before it joins them, which
gives another layout than a cut through the joined tensor.

Shapes: E experts, F expert width, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from agri_moe.models.causal import CausalModel


# ---- cutting


def shard(model: CausalModel, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shard a model that is trained: each layer by itself, then the rest with the head, whose forward holds the loss.

    As under autocast, the residual stream, the embedding and the head's gradient keep their type, whatever that of the
    layers' weights. Gradients are reduced in float32.

    Args:
        model: Changed in place; its parameters become shards.
        mesh: One-dimensional.
        dtype: Type in which the layers' parameters are gathered and used; None keeps their own.
    """
    model.layer_dtype = dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.hf.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=partial(_placement, mesh.size()))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    register_fsdp_forward_method(model, "generate")  # embedding and head are then whole for all of its steps


def shard_frozen(model: CausalModel, mesh: DeviceMesh) -> None:
    """Shard a model that only answers: its layers and, where the head is not the embedding, the embedding too.

    The head stays whole on every rank: a loss reads it after the forward pass in which FSDP2 would have gathered it,
    at every step and beside the student's, so gathering it would lower no peak and cost one more collective. For a head
    of 151,936 x 5,120 in bfloat16 that is 1.6 GB.

    Args:
        model: Changed in place.
        mesh: One-dimensional.
    """
    head, embedding = model.hf.get_output_embeddings(), model.hf.get_input_embeddings()
    for layer in model.hf.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=partial(_placement, mesh.size()))
    if embedding.weight is not head.weight:
        fully_shard(embedding, mesh=mesh)
    # Without a backward pass the root would otherwise stay gathered for good.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params={head.weight})


def _placement(ranks: int, parameter: nn.Parameter) -> Shard:
    """Where to cut: fused experts, [E, 2F, D] and [E, D, F], are fewer than the ranks of a large job.

    Cut along E, the ranks past the last expert would hold nothing, and every gather would be padded for them. FSDP2
    cuts other dimensions evenly or not at all.
    """
    inner = [dim for dim in (1, 2) if parameter.ndim == 3 and parameter.shape[dim] % ranks == 0]
    return Shard(inner[0] if inner else 0)


# ---- filling


def materialise(hf: PreTrainedModel, device: torch.device) -> None:
    """Give the pieces of a model on the meta device memory, and its buffers their values.

    Args:
        hf: Sharded; its parameters hold anything afterwards.
        device: Where this rank keeps its pieces.
    """
    hf.to_empty(device=device)
    hf.tie_weights()  # to_empty gives what is not sharded a memory for each of its names
    for module in hf.modules():
        if list(module.buffers(recurse=False)):
            hf._init_weights(module)  # where transformers computes what no checkpoint stores: rotary frequencies


def draw(hf: PreTrainedModel, module: nn.Module) -> None:
    """Draw the parameters that a module itself holds as transformers does, and keep this rank's pieces.

    Every rank draws them whole, one module at a time, so the generators of all ranks must stand alike. transformers
    draws the modules of a whole model in another order: with one seed, the values are others.

    Args:
        hf: The model of the module.
        module: Changed in place.
    """
    pieces = dict(module.named_parameters(recurse=False))
    for name, piece in pieces.items():
        whole = torch.empty(piece.shape, dtype=piece.dtype)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=False))
    hf._init_weights(module)
    for name, piece in pieces.items():
        place(piece, module.get_parameter(name))
        module.register_parameter(name, piece)


@torch.no_grad()
def place(parameter: Tensor, values: Tensor, offset: Sequence[int] = ()) -> None:
    """Write into a parameter what this rank holds of some values.

    Args:
        parameter: Whole, or a DTensor of any sharding.
        values: Any type and device; leading dimensions of size 1 may be left out.
        offset: Where the values begin in the whole parameter; its beginning by default.
    """
    values = values[(None,) * (parameter.ndim - values.ndim)]
    piece, first = parameter, (0,) * parameter.ndim
    if isinstance(parameter, DTensor):
        piece = parameter.to_local()
        _, first = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    for dim, start in enumerate(offset or [0] * parameter.ndim):
        begin = max(start, first[dim])
        end = min(start + values.shape[dim], first[dim] + piece.shape[dim])
        if begin >= end:
            return
        values = values.narrow(dim, begin - start, end - begin)
        piece = piece.narrow(dim, begin - first[dim], end - begin)
    piece.copy_(values)


def rows(weight_VD: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """Rows of a matrix, whole on every rank; for a DTensor, every rank must ask."""
    index = torch.as_tensor(ids, device=weight_VD.device)
    if not isinstance(weight_VD, DTensor):
        return weight_VD[index]
    everywhere = DTensor.from_local(index, weight_VD.device_mesh, [Replicate()])
    found = functional.embedding(everywhere, weight_VD)
    assert isinstance(found, DTensor), "as its weight is"
    return found.full_tensor()
