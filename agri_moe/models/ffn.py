"""The feed-forward networks of a model, found by structure and not by name.

Shapes: N tokens, D model width, F width of the network.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from agri_moe.models.moe import MoE
from agri_moe.models.upcycle import is_moe

# Relative error at which the maps that were found count as the network that runs; bfloat16 rounds to 1/256.
SAME = 0.05


@dataclass(frozen=True, eq=False)
class FFN:
    """One feed-forward network: `down(act(gate x) * up x)`, or `down(act(up x))`.

    Args:
        name: Of the module that the linear maps stand in.
        owner: That module; it may hold more than them, as OPT's layers do.
        readers: The maps that read: gate and up, or up alone, or one with gate above up.
        down: The map that writes.
        act_fn: The activation.
        gated: Whether there is a gate.
    """

    name: str
    owner: nn.Module
    readers: tuple[nn.Linear, ...]
    down: nn.Linear
    act_fn: Any
    gated: bool

    @property
    def width(self) -> int:
        """F."""
        return self.down.in_features

    @property
    def layers_name(self) -> str:
        """Name of the list of layers that it is in."""
        return re.split(r"\.\d+(?:\.|$)", self.name)[0]

    @property
    def layer(self) -> int:
        """Its place in that list."""
        match = re.search(r"\.(\d+)(?:\.|$)", self.name)
        assert match is not None, "only modules in a list are looked at"
        return int(match[1])

    def weights(self) -> dict[str, Tensor]:
        """The weights with a row for each neuron, by the names that `MoE` gives them; `bias_D` is the whole layer's."""
        parts: list[tuple[Tensor, Tensor | None]] = [(linear.weight, linear.bias) for linear in self.readers]
        if self.gated and len(self.readers) == 1:
            (weight, bias) = parts[0]
            biases = bias.chunk(2) if bias is not None else (None, None)
            parts = list(zip(weight.chunk(2), biases, strict=True))
        found: dict[str, Tensor | None] = {"down_SD": self.down.weight.T, "bias_D": self.down.bias}
        for name, (weight, bias) in zip(["gate", "up"] if self.gated else ["up"], parts, strict=True):
            found |= {f"{name}_SD": weight, f"{name}_bias_S": bias}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def neurons(self, x_ND: Tensor) -> Tensor:
        """What each neuron says of each token [N, F], before `down`."""
        own = self.weights()
        up_NF = F.linear(x_ND, own["up_SD"], own.get("up_bias_S"))
        if not self.gated:
            return self.act_fn(up_NF)
        return self.act_fn(F.linear(x_ND, own["gate_SD"], own.get("gate_bias_S"))) * up_NF

    @torch.no_grad()
    def answer(self, x_ND: Tensor) -> Tensor:
        """What the network says [N, D], from the maps that were found."""
        return self.down(self.neurons(x_ND))


def find_ffns(model: PreTrainedModel, key: str) -> list[FFN]:
    """The networks of a model, first layer first, from its shapes: the model may be on the meta device.

    A network is two maps D -> F, one D -> F or one D -> 2 F, beside one F -> D, that stand in one module of a list of
    layers with no other map. Whether they are what runs is another question, see `prove`.

    Args:
        model: A causal language model.
        key: The setting that named it, for messages.

    Raises:
        ValueError: If there is none, they differ in shape, or the model is sparse already.
    """
    if is_moe(model.config):
        raise ValueError(f"{key} is a {model.config.model_type}, which is sparse already: name a dense model.")
    width = model.config.get_text_config().hidden_size
    lists: dict[str, list[FFN]] = defaultdict(list)
    for name, module in model.named_modules():
        if re.search(r"\.\d+(\.|$)", name) and (ffn := _as_ffn(name, module, width, model.config)):
            lists[ffn.layers_name].append(ffn)
    if not lists:
        raise ValueError(
            f"{key} is a {model.config.model_type} in which no feed-forward network was found (linear maps from "
            f"{width} and back in one module of each layer): name a model built like Llama, Mistral, Qwen or Gemma."
        )
    found = max(lists.values(), key=len)
    for ffn in found:
        if (ffn.width, ffn.gated) != (found[0].width, found[0].gated):
            raise ValueError(
                f"{key}: {ffn.name} has a width of {ffn.width}, {found[0].name} of {found[0].width}: name a model "
                "whose feed-forward networks are all alike."
            )
    return found


def _as_ffn(name: str, module: nn.Module, width: int, config: PreTrainedConfig) -> FFN | None:
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    writers = [one for one in linears if one.out_features == width]
    readers = [one for one in linears if one.in_features == width]
    if len(writers) != 1 or len(writers) + len(readers) != len(linears) or writers[0] in readers:
        return None
    inner = writers[0].in_features
    sizes = [reader.out_features for reader in readers]
    if sizes not in ([inner], [inner, inner], [2 * inner]):
        return None
    return FFN(name, module, tuple(readers), writers[0], _activation(module, config), sizes != [inner])


def _activation(module: nn.Module, config: PreTrainedConfig) -> Any:
    """The one child without parameters that does something; else what the config names."""
    skipped = (nn.Dropout, nn.Identity, nn.Linear)
    own = [c for c in module.children() if not isinstance(c, skipped) and not any(True for _ in c.parameters())]
    if len(own) == 1:
        return own[0]
    names = ("hidden_act", "hidden_activation", "activation_function")
    return ACT2FN[next(getattr(config, name) for name in names if getattr(config, name, None))]


@torch.no_grad()
def prove(model: PreTrainedModel, ffns: Sequence[FFN], key: str) -> list[FFN]:
    """Check on a few tokens that the maps found are what runs; tell gate from up by that.

    Raises:
        ValueError: If some network does something else.
    """
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with record(ffns) as kept:
        model.base_model(input_ids=tokens, use_cache=False)
        seen = {ffn.name: (x.flatten(0, -2), y.flatten(0, -2)) for ffn, (x, y) in zip(ffns, kept, strict=True)}
    return [_in_order(ffn, *seen[ffn.name], key=key) for ffn in ffns]


def _in_order(ffn: FFN, x_ND: Tensor, y_ND: Tensor, key: str) -> FFN:
    orders = [ffn.readers, ffn.readers[::-1]] if len(ffn.readers) == 2 else [ffn.readers]
    for readers in orders:
        ordered = replace(ffn, readers=readers)
        if (ordered.answer(x_ND) - y_ND).norm() <= SAME * y_ND.norm():
            return ordered
    raise ValueError(
        f"{key}: {ffn.name} looks like a feed-forward network and computes something else than down(act(gate x) * "
        "up x) or down(act(up x)): name another model."
    )


def describe(ffns: Sequence[FFN]) -> str:
    """One line on what was found."""
    one = ffns[0]
    maps = "gate, up and down" if one.gated else "up and down"
    place = re.sub(r"\.\d+(?=\.|$)", ".*", one.name)
    act = type(one.act_fn).__name__.removesuffix("Activation")
    return (
        f"{len(ffns)} feed-forward networks ({place}: {maps}), D {one.down.out_features}, F {one.width}, {act}, "
        f"{str(one.down.weight.dtype).removeprefix('torch.')}"
    )


@contextmanager
def record(ffns: Sequence[FFN], positions_N: Tensor | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keep what each network reads and writes in one forward pass, in their order; whole when the pass is done.

    Args:
        ffns: The networks, first layer first.
        positions_N: Flat indices into [B, T], to keep [N, D]; None keeps [B, T, D].
    """
    kept: list[tuple[Tensor, Tensor]] = []
    reading: list[Tensor] = []

    def chosen(tensor: Tensor) -> Tensor:
        return tensor if positions_N is None else tensor.flatten(0, -2)[positions_N]

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        reading.append(args[0])

    def write(_: nn.Module, __: Any, y: Tensor) -> None:
        kept.append((chosen(reading.pop()), chosen(y)))

    with _hooked(ffns, read, write):
        yield kept


@contextmanager
def instead(ffns: Sequence[FFN], moes: Sequence[MoE], positions_N: Tensor) -> Iterator[None]:
    """Let mixtures answer for networks, which still run; where there is padding, the network's own answer stays.

    Args:
        ffns: The networks.
        moes: As many mixtures.
        positions_N: Flat indices into [B, T] of what is no padding.
    """
    reading: list[Tensor] = []
    moe_of: dict[nn.Module, MoE] = {ffn.down: moe for ffn, moe in zip(ffns, moes, strict=True)}

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        reading.append(args[0])

    def write(down: nn.Module, _: Any, y: Tensor) -> Tensor:
        x_ND = reading.pop().flatten(0, -2)[positions_N]
        answer_ND = moe_of[down](x_ND).output_ND.to(y.dtype)
        return y.flatten(0, -2).index_copy(0, positions_N, answer_ND).view_as(y)

    with _hooked(ffns, read, write):
        yield


@contextmanager
def _hooked(ffns: Sequence[FFN], read: Any, write: Any) -> Iterator[None]:
    handles = [ffn.readers[0].register_forward_pre_hook(read) for ffn in ffns]
    handles += [ffn.down.register_forward_hook(write) for ffn in ffns]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only_first_layers(model: PreTrainedModel, ffn: FFN) -> Iterator[None]:
    """Let the model end after the layer of this network."""
    parent, _, attribute = ffn.layers_name.rpartition(".")
    owner = model.get_submodule(parent)
    layers = getattr(owner, attribute)
    setattr(owner, attribute, nn.ModuleList(list(layers)[: ffn.layer + 1]))
    try:
        yield
    finally:
        setattr(owner, attribute, layers)


def put_in_place(model: PreTrainedModel, blocks: Mapping[str, nn.Module], ffns: Sequence[FFN]) -> None:
    """Let modules run where networks stood, in place; what they replace is let go.

    Args:
        model: The networks' model.
        blocks: Name of a network -> what takes its place.
        ffns: The networks, of which those without a block stay.
    """
    for ffn in ffns:
        if (block := blocks.get(ffn.name)) is None:
            continue
        names = {child: name for name, child in ffn.owner.named_children()}
        if _is_alone(ffn):
            parent, _, attribute = ffn.name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, block)
            continue
        # The maps stand beside others: the first of them becomes the block, and what follows lets it through.
        setattr(ffn.owner, names[ffn.readers[0]], block)
        for rest in (ffn.down, ffn.act_fn):
            setattr(ffn.owner, names[rest], nn.Identity())


def _is_alone(ffn: FFN) -> bool:
    own = {parameter for linear in (*ffn.readers, ffn.down) for parameter in linear.parameters()}
    return set(ffn.owner.parameters()) == own
