"""Upcycling: a dense checkpoint becomes a sparse one, tensor by tensor, without loading either whole.

Shapes: D model width, F expert width, E experts, K experts per token, G slices per copy, L layers,
V vocabulary.

Sources: Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055); Drop-Upcycling (Nakamura et al. 2025,
arXiv 2502.19261); granular experts and virtual groups (He et al. 2024, "Upcycling Large Language Models into
Mixture of Experts", arXiv 2410.07524).

A family is added by rows in `FAMILIES`: names of the dense checkpoint on the left, of the MoE on the right.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights

from agri_moe.models.checkpoint_files import (
    CONFIG,
    DTYPES,
    EMBEDDING,
    HEAD,
    ExtendedTensor,
    NewRows,
    StoredTensor,
    TensorInfo,
    checkpoint_folder,
    copy_companions,
    grown,
    leans,
    load_config,
    new_checkpoint,
    read_json,
    refuse_output,
    stored_tensors,
    write_weights,
)
from agri_moe.models.sharding import place
from agri_moe.runs import replace_text

Part = Literal["copy", "router", "gate", "up", "down"]
T = TypeVar("T")


@dataclass(frozen=True)
class UpcycleSpec:
    """How a dense model becomes a mixture.

    Args:
        num_experts: Experts per layer, slices included: num_experts / granularity copies of the FFN.
        num_experts_per_tok: Experts that each token visits; a multiple of granularity.
        jitter: Standard deviation of the noise added to each expert, over the weight's own. Identical experts
            give the router no gradient from the language-model loss, hence 0.01 and not 0.
        drop_ratio: Share of each expert's intermediate dimensions redrawn from that tensor's own mean
            and standard deviation (Nakamura et al. 2025).
        granularity: Slices that each FFN is cut into (He et al. 2024); 1 keeps it whole.
        router_std: Standard deviation of the router's rows; 0.02 is the initializer_range of these families.
        seed: Seeds router, jitter and drop; the same seed gives the same bytes.

    Raises:
        ValueError: In one sentence that names the key, when a value cannot be.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    jitter: float = 0.01
    drop_ratio: float = 0.0
    granularity: int = 1
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        experts, top_k, slices = self.num_experts, self.num_experts_per_tok, max(self.granularity, 1)
        rules = (
            ("granularity", self.granularity >= 1, "at least 1"),
            ("num_experts", experts >= 1, "at least 1"),
            ("num_experts_per_tok", top_k >= 1, "at least 1"),
            ("num_experts_per_tok", top_k <= experts, f"at most num_experts, {experts}"),
            ("num_experts", experts % slices == 0, f"a multiple of granularity, {slices}"),
            ("num_experts_per_tok", top_k % slices == 0, f"a multiple of granularity, {slices}"),
            ("seed", self.seed >= 0, "at least 0"),
            ("jitter", 0 <= self.jitter < math.inf, "a finite number, at least 0"),
            ("drop_ratio", 0 <= self.drop_ratio <= 1, "between 0 and 1"),
            ("router_std", 0 <= self.router_std < math.inf, "a finite number, at least 0"),
            # Equal rows would let top-k pick slices of different copies, and their sum would be no whole FFN.
            ("router_std", slices == 1 or self.router_std > 0, "positive where granularity is above 1"),
        )
        for key, holds, demand in rules:
            if not holds:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be {demand}.")


# ---- the key tables


@dataclass(frozen=True)
class Row:
    """One line of a key table: {l} is the layer, {e} the expert; `part` says what is done on the way."""

    dense: str
    moe: str
    part: Part = "copy"


# Where transformers v5 keeps these in memory, in all these MoEs: [E, 2F, D] with gate before up, [E, D, F], [E, D].
_FUSED: dict[Part, str] = {
    "gate": "model.layers.{l}.mlp.experts.gate_up_proj",
    "up": "model.layers.{l}.mlp.experts.gate_up_proj",
    "down": "model.layers.{l}.mlp.experts.down_proj",
    "router": "model.layers.{l}.mlp.gate.weight",
}
_SAME_IN_ALL = (
    EMBEDDING,
    "model.norm.weight",
    HEAD,
    "model.layers.{l}.input_layernorm.weight",
    "model.layers.{l}.post_attention_layernorm.weight",
    *(f"model.layers.{{l}}.self_attn.{name}_proj.weight" for name in "qkvo"),
)
_ONLY_QWEN3 = (
    "model.layers.{l}.self_attn.q_norm.weight",
    "model.layers.{l}.self_attn.k_norm.weight",
    *(f"model.layers.{{l}}.self_attn.{name}_proj.bias" for name in "qkvo"),
)
# The router is drawn and not copied, in the dtype of the tensor on its left.
_QWEN3_ROWS = (
    *(Row(name, name) for name in _SAME_IN_ALL + _ONLY_QWEN3),
    Row("model.layers.{l}.mlp.gate_proj.weight", "model.layers.{l}.mlp.gate.weight", "router"),
    Row("model.layers.{l}.mlp.gate_proj.weight", "model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "gate"),
    Row("model.layers.{l}.mlp.up_proj.weight", "model.layers.{l}.mlp.experts.{e}.up_proj.weight", "up"),
    Row("model.layers.{l}.mlp.down_proj.weight", "model.layers.{l}.mlp.experts.{e}.down_proj.weight", "down"),
)
_MIXTRAL_ROWS = (
    *(Row(name, name) for name in _SAME_IN_ALL),
    Row("model.layers.{l}.mlp.gate_proj.weight", "model.layers.{l}.block_sparse_moe.gate.weight", "router"),
    Row("model.layers.{l}.mlp.gate_proj.weight", "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "gate"),
    Row("model.layers.{l}.mlp.up_proj.weight", "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "up"),
    Row("model.layers.{l}.mlp.down_proj.weight", "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "down"),
)

# model_type, architectures and layer_types are *not* here: they would turn the MoE back into the dense model.
_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "dtype", "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a dense family becomes, and by which rows."""

    moe: type[PreTrainedConfig]
    architecture: str
    rows: tuple[Row, ...]
    width: str  # the config key that holds F, the width of one expert
    config_keys: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()  # config keys that have no place in the MoE when they are true


_LLAMA = Family(
    MixtralConfig, "MixtralForCausalLM", _MIXTRAL_ROWS, "intermediate_size", refused=("attention_bias", "mlp_bias")
)
FAMILIES = {
    "qwen3": Family(
        Qwen3MoeConfig, "Qwen3MoeForCausalLM", _QWEN3_ROWS, "moe_intermediate_size", config_keys=("attention_bias",)
    ),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, config_keys=("sliding_window",)),
}


def moe_rows() -> dict[str, tuple[Row, ...]]:
    """Model type of each MoE that a family becomes -> its rows."""
    return {family.moe.model_type: family.rows for family in FAMILIES.values()}


# ---- configs


def is_moe(config: PreTrainedConfig) -> bool:
    """Whether a config describes a mixture of experts."""
    return any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def moe_config(source: PreTrainedConfig, spec: UpcycleSpec) -> PreTrainedConfig:
    """The stock MoE config that a dense config becomes.

    `norm_topk_prob` is true: else the weights of the chosen experts do not add up to 1, and copies of the FFN
    would not give the dense output.

    Raises:
        ValueError: When the family is unknown, or something of the source has no place in the MoE.
    """
    if is_moe(source):
        raise ValueError(f"The source is already a mixture of experts ({source.model_type}): give a dense model.")
    if source.model_type not in FAMILIES:
        raise ValueError(f"The source is a {source.model_type} model: upcycling knows {', '.join(FAMILIES)}.")
    family = FAMILIES[source.model_type]
    for key in family.refused:
        if getattr(source, key, False):
            raise ValueError(f"{key} of the source is true, and {family.architecture} has no such bias: use another.")
    if getattr(source, "quantization_config", None):
        raise ValueError("The source is quantized (quantization_config): use its unquantized checkpoint.")
    if (source.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor of the source is not 1, and the MoE rotates whole heads: use another.")
    width = source.intermediate_size
    if width % spec.granularity:
        raise ValueError(f"granularity is {spec.granularity}: it must divide intermediate_size, {width}.")
    values = {key: getattr(source, key) for key in (*_CONFIG_KEYS, *family.config_keys) if hasattr(source, key)}
    if family.moe is Qwen3MoeConfig:
        values |= _qwen3_values(source)
    return family.moe(
        **values | {family.width: width // spec.granularity},
        architectures=[family.architecture],
        rope_parameters=dict(source.rope_parameters),
        num_local_experts=spec.num_experts,
        num_experts_per_tok=spec.num_experts_per_tok,
        norm_topk_prob=True,
        output_router_logits=False,
    )


def _qwen3_values(source: PreTrainedConfig) -> dict[str, Any]:
    # Qwen3 slides from layer max_window_layers on; Qwen3-MoE slides in every layer or in none.
    sliding = [kind == "sliding_attention" for kind in source.layer_types]
    if any(sliding) and not all(sliding):
        raise ValueError(
            f"use_sliding_window of the source covers {sum(sliding)} of {len(sliding)} layers, and Qwen3-MoE "
            "can slide in all or in none: use another source."
        )
    return {
        "intermediate_size": source.intermediate_size,
        "use_sliding_window": any(sliding),
        "sliding_window": source.sliding_window if any(sliding) else None,
        "max_window_layers": 0 if any(sliding) else source.num_hidden_layers,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def write_moe_config(folder: Path) -> None:
    """Patch `config.json` of a saved MoE so that readers other than transformers v5 understand it.

    v5 writes `num_local_experts`, `rope_parameters` and `dtype` only. Other readers look for `num_experts`,
    and silently take a `rope_theta` of 10,000 and float32 where the older names are absent. `norm_topk_prob`
    becomes explicit (absent means false to most readers); a value that the file gives is kept.

    Raises:
        ValueError: When the folder holds no readable config, or one without experts.
    """
    path = Path(folder) / CONFIG
    values = read_json(path)
    experts = values.get("num_local_experts") or values.get("num_experts")
    if not experts:
        raise ValueError(f"{path} names no experts: it is not the config of a mixture of experts.")
    values["num_experts"] = values["num_local_experts"] = experts
    values.setdefault("norm_topk_prob", True)
    rope = dict(values.get("rope_parameters") or {})
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if values.get("dtype"):
        values["torch_dtype"] = values["dtype"]
    replace_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of an MoE: all of them, and those that one token visits (a tied head counts once)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return total, total - experts + experts * config.num_experts_per_tok // config.num_local_experts


# ---- planning


@dataclass(frozen=True)
class Target:
    """A tensor of the MoE's checkpoint; layer and expert are -1 where it belongs to none."""

    name: str
    shape: tuple[int, ...]
    part: Part
    layer: int
    expert: int
    dense: str  # the tensor that it is made of
    memory: str  # the parameter that holds it in memory

    @property
    def width_axis(self) -> int:
        """Where F, an expert's width, stands in the shape."""
        return 1 if self.part == "down" else 0

    @property
    def offset(self) -> tuple[int, ...]:
        """Where the tensor begins in the parameter that holds it; experts are fused as [E, 2F, D], gate first."""
        if self.expert < 0:
            return (0,) * len(self.shape)
        return self.expert, self.shape[0] if self.part == "up" else 0, 0


def expected_tensors(config: PreTrainedConfig) -> dict[str, Target]:
    """The tensors of a stock checkpoint by name, with the shapes that the stock model declares.

    The names are those of hub checkpoints, weights per expert for the MoEs of `FAMILIES`, and those in memory for any
    other model; a tied head is left out.
    """
    rows_in_memory: dict[str, list[Row]] = defaultdict(list)
    for row in moe_rows().get(config.model_type, ()):
        rows_in_memory[_FUSED.get(row.part, row.moe)].append(row)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    targets: dict[str, Target] = {}
    for memory, parameter in model.named_parameters():  # which leave out a tied head
        template, layer = _template(memory)
        rows = rows_in_memory.get(template, [Row(template, template)])
        for row in rows:
            shape, experts = tuple(parameter.shape), [-1]
            if "{e}" in row.moe:
                shape, experts = (shape[1] // len(rows), shape[2]), list(range(shape[0]))
            for expert in experts:
                name = row.moe.format(l=layer, e=expert)
                targets[name] = Target(name, shape, row.part, layer, expert, row.dense.format(l=layer), memory)
    return targets


def _template(name: str) -> tuple[str, int]:
    """`model.layers.{l}.x` and 3 for `model.layers.3.x`; -1 where there is no layer."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (name.replace(match[0], "model.layers.{l}.", 1), int(match[1])) if match else (name, -1)


@dataclass(frozen=True)
class Entry(TensorInfo):
    """One tensor to write, and what it is made from."""

    target: Target
    stored: StoredTensor


@dataclass(frozen=True)
class Plan:
    """What to write, one list of tensors per shard: what stands before the layers, each layer, what follows."""

    folder: Path
    source: PreTrainedConfig
    config: PreTrainedConfig
    shards: list[list[Entry]]


def _plan(source: str | Path, spec: UpcycleSpec, new_rows: NewRows | None = None, merged: Collection[int] = ()) -> Plan:
    """All that can be known, or refused, from configs and headers; the config before weights are fetched."""
    dense = load_config(checkpoint_folder(source, [CONFIG]), "source")
    config = moe_config(dense, spec)
    folder = checkpoint_folder(source)
    tensors = stored_tensors(folder)
    if new_rows:
        config.vocab_size = grown(config.vocab_size, new_rows)
        for name, lean in zip((EMBEDDING, HEAD), leans(config.tie_word_embeddings), strict=True):
            if stored := tensors.get(name):
                if list(stored.shape) != [dense.vocab_size, dense.hidden_size]:
                    raise ValueError(f"{stored.path} holds {name} of shape {list(stored.shape)}, unlike its config.")
                tensors[name] = ExtendedTensor.of(stored, config.vocab_size, new_rows, dict.fromkeys(merged, lean))
    if config.tie_word_embeddings:  # stored by some checkpoints; the embedding is what every reader uses
        tensors.pop(HEAD, None)
    targets = expected_tensors(config)
    shards: dict[float, list[Entry]] = defaultdict(list)
    for target in targets.values():
        if stored := tensors.get(target.dense):
            _check_stored(stored, target, spec)
            outside = -1 if "embed" in target.name else math.inf
            shard = shards[outside if target.layer < 0 else target.layer]
            shard.append(Entry(target.name, stored.dtype, target.shape, target, stored))
    _check_all_used(tensors, {target.dense for target in targets.values()}, config)
    if missing := [target.name for target in targets.values() if target.dense not in tensors]:
        raise ValueError(f"{folder} gives no tensor for {min(missing)} ({len(missing)} such): it is incomplete.")
    return Plan(folder, dense, config, [sorted(shards[place], key=_order) for place in sorted(shards)])


def _check_stored(stored: StoredTensor, target: Target, spec: UpcycleSpec) -> None:
    if stored.dtype not in DTYPES:
        raise ValueError(f"{stored.path} holds {stored.name} as {stored.dtype}: upcycling takes {', '.join(DTYPES)}.")
    shape = list(target.shape)
    if target.expert >= 0:
        shape[target.width_axis] *= spec.granularity
    if target.part != "router" and list(stored.shape) != shape:
        raise ValueError(
            f"{stored.path} holds {stored.name} of shape {list(stored.shape)}: its config asks for {shape}."
        )


def _check_all_used(tensors: dict[str, StoredTensor], used: set[str], config: PreTrainedConfig) -> None:
    known = {row.dense for row in moe_rows()[config.model_type]}
    for name in sorted(tensors.keys() - used):
        if not name.endswith(".rotary_emb.inv_freq"):  # stored by old Llama checkpoints, computed from the config
            reason = "its config.json makes no use of"
            if _template(name)[0] not in known:
                reason = f"{config.architectures[0]} has no place for"
            raise ValueError(f"{tensors[name].path} holds {name}, which {reason}.")


def _order(entry: Entry) -> tuple[int, int, str]:
    return get_args(Part).index(entry.target.part), entry.target.expert, entry.name


# ---- making


def _generator(spec: UpcycleSpec, target: Target, what: str) -> torch.Generator:
    """A generator of this tensor's own, so that order, threads and interruptions do not matter."""
    # torch's CPU generator keeps 32 bits of its seed: hashed places would collide now and then, so places
    # are counted from a hashed start.
    start = int.from_bytes(hashlib.blake2b(str(spec.seed).encode(), digest_size=4).digest(), "little")
    kinds = ("router", "dims", "gate", "up", "down")
    place = ((target.layer + 1) * (spec.num_experts + 1) + target.expert + 1) * len(kinds) + kinds.index(what)
    return torch.Generator().manual_seed((start + place) % 2**32)


def _statistics(dense: Tensor) -> tuple[float, float]:
    """Mean and standard deviation in float64."""
    total = square = 0.0
    # Pieces too small for torch to split among threads: the last bit must not depend on their number.
    for piece in dense.reshape(-1).split(1 << 14):
        values = piece.double()
        total += values.sum().item()
        square += values.square().sum().item()
    mean = total / dense.numel()
    return mean, math.sqrt(max(square / dense.numel() - mean * mean, 0.0))


def _expert(target: Target, dense: Tensor, mean: float, std: float, spec: UpcycleSpec) -> Tensor:
    """One expert's tensor, [F, D] or [D, F] for down: slice, scale, jitter, redraw.

    It is made of `dense`, gate or up [G F, D] or down [D, G F], and of its mean and standard deviation; where there
    is nothing to do it is `dense` itself.
    """
    axis = target.width_axis
    width = target.shape[axis]
    out = dense.narrow(axis, target.expert % spec.granularity * width, width).contiguous()
    if target.part == "down" and spec.granularity > 1:
        # Each slice gets 1/G of its copy's share of the router's weight, so its output counts G times.
        # (He et al.'s cube-root scaling spreads G over three matrices around a nonlinearity: 20% off.)
        out, mean, std = out * spec.granularity, mean * spec.granularity, std * spec.granularity
    generator = _generator(spec, target, target.part)
    if spec.jitter and std:
        out = _jittered(out, spec.jitter * std, generator)
    if dropped := round(spec.drop_ratio * width):
        # The same dimensions in gate, up and down.
        dims = torch.randperm(width, generator=_generator(spec, target, "dims"))[:dropped]
        shape = (dropped, out.shape[1]) if axis == 0 else (out.shape[0], dropped)
        fresh = torch.empty(shape).normal_(mean, std, generator=generator).to(out.dtype)
        out = out.index_copy(axis, dims, fresh)
    return out


def _jittered(weight: Tensor, std: float, generator: torch.Generator) -> Tensor:
    out = torch.empty_like(weight)
    run = 1 << 18  # 1 MB of noise stays in the cache through all passes
    for source, target in zip(weight.view(-1).split(run), out.view(-1).split(run), strict=True):
        target.copy_(torch.empty(len(source)).normal_(0.0, std, generator=generator).add_(source))
    return out


def _router(target: Target, spec: UpcycleSpec) -> Tensor:
    """Router rows [E, D]: one per copy of the FFN, shared by its G slices so that they are chosen together.

    In bf16 two *copies* tie on about one token in a thousand, and top-k may then mix their slices on it.
    """
    rows = torch.zeros(spec.num_experts // spec.granularity, target.shape[1])
    if spec.router_std:
        rows.normal_(0.0, spec.router_std, generator=_generator(spec, target, "router"))
    return rows.repeat_interleave(spec.granularity, 0)


def _make(entries: Iterable[Entry], spec: UpcycleSpec) -> Iterator[tuple[Entry, Tensor]]:
    """The tensors of the entries, in their order; the experts of one matrix are made at once, by a few threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for (part, stored), group in groupby(entries, key=lambda entry: (entry.target.part, entry.stored)):
            dense = stored.read()
            if part == "copy":
                yield from ((entry, dense) for entry in group)
            elif part == "router":
                yield from ((entry, _router(entry.target, spec).to(dense.dtype)) for entry in group)
            else:
                mean, std = _statistics(dense) if spec.jitter or spec.drop_ratio else (0.0, 0.0)
                make = partial(_expert, dense=dense, mean=mean, std=std, spec=spec)
                experts = list(group)
                yield from zip(experts, pool.map(make, [entry.target for entry in experts]), strict=True)


def _pieces(entries: Iterable[Entry], spec: UpcycleSpec) -> Iterator[Tensor]:
    """The same without names, and with copies in pieces: an embedding can be larger than a layer."""
    for part, group in groupby(entries, key=lambda entry: entry.target.part):
        if part == "copy":
            yield from (piece for entry in group for piece in entry.stored.pieces())
        else:
            yield from (tensor for _, tensor in _make(group, spec))


def upcycled_tensors(source: str | Path, spec: UpcycleSpec) -> Iterator[tuple[str, Tensor]]:
    """Stream the MoE's tensors under their checkpoint names, layer by layer, in the dtypes of the source.

    Arguments and errors are those of `upcycle`. With jitter 0 experts share memory: do not write into them.
    """
    for shard in _plan(source, spec).shards:
        yield from ((entry.name, tensor) for entry, tensor in _make(shard, spec))


Placed = tuple[Target, Tensor]
"""A tensor, and where it belongs."""


def upcycled_placed(source: str | Path, spec: UpcycleSpec) -> Iterator[Placed]:
    """The tensors of the MoE one after the other; arguments and errors are those of `upcycle`.

    They are made in the source's dtype. Memory: one FFN matrix of each expert of a layer.
    """
    return _placed(_plan(source, spec), spec)


def _placed(plan: Plan, spec: UpcycleSpec) -> Iterator[Placed]:
    entries = [entry for shard in plan.shards for entry in shard]
    for entry, tensor in _progress(_make(entries, spec), len(entries), "upcycle"):
        yield entry.target, tensor


def stored_placed(source: str | Path) -> Iterator[Placed]:
    """The tensors of a checkpoint one after the other, mapped from its files; ask `unreadable` first."""
    stored = stored_tensors(checkpoint_folder(source))
    targets = expected_tensors(load_config(source, "source"))
    for target in _progress(targets.values(), len(targets), "read"):
        yield target, stored[target.name].read()


def _progress(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """A progress bar, on the first of several ranks that do the same."""
    others = dist.is_initialized() and dist.get_rank() > 0
    return tqdm(items, total=total, desc=what, unit="tensor", disable=others)


def unreadable(source: str | Path) -> str | None:
    """Why `stored_placed` cannot read a checkpoint; None if it can.

    It knows dense models, whose tensors are stored under their names in memory, and the MoEs of `FAMILIES`.
    """
    config = load_config(source, "source")
    if getattr(config, "quantization_config", None):
        return "it is quantized"
    try:
        stored = stored_tensors(checkpoint_folder(source))
    except ValueError as error:
        return str(error).rstrip(".")
    for target in expected_tensors(config).values():
        found = stored.get(target.name)
        if found is None:
            return f"it has no tensor {target.name}"
        if found.shape != target.shape or found.dtype not in DTYPES:
            return f"{target.name} is {found.dtype} {list(found.shape)} and not {list(target.shape)}"
    return None


def load_upcycled(source: str, spec: UpcycleSpec, *, dtype: torch.dtype) -> PreTrainedModel:
    """Upcycle in memory: bit for bit the model that `upcycle` and `from_pretrained` would give, in eval mode.

    The experts are made in the source's dtype and then cast to `dtype`. Other arguments and errors are those of
    `upcycle`. Memory: the model and one FFN matrix of each expert.
    """
    plan = _plan(source, spec)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(plan.config, dtype=dtype)
    fill(model, _placed(plan, spec))
    model.tie_weights()  # no_init_weights leaves a tied head untied
    if (plan.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(plan.folder)
    return model.eval()


def fill(model: PreTrainedModel, tensors: Iterable[Placed]) -> None:
    """Write tensors into a model, or this rank's pieces of them into a sharded one."""
    parameters = dict(model.named_parameters())
    for target, tensor in tensors:
        place(parameters[target.memory], tensor, target.offset)


def stored_parts(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a stock model under the names of its checkpoint, views of what it holds in memory."""
    parameters = dict(model.named_parameters())
    parts = {}
    for name, target in expected_tensors(model.config).items():
        part = parameters[target.memory].detach()
        if target.expert >= 0:
            part = part[target.expert].narrow(0, target.offset[1], target.shape[0])
        parts[name] = part
    return parts


def upcycle(
    source: str | Path,
    output: str | Path,
    spec: UpcycleSpec,
    *,
    new_rows: NewRows | None = None,
    merged: Collection[int] = (),
    save_tokenizer: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the upcycled checkpoint: one shard per layer, weights per expert, beside the source's tokenizer.

    The folder appears under its name only when it is complete; until then it is `OUTPUT.partial`. Run again
    after an interruption, it keeps finished shards and ends with the bytes of an unbroken run. Memory: one FFN
    matrix and each expert's copy of it (a third of a layer), whatever the size of the model.

    Args:
        source: Folder or Hugging Face name of a dense checkpoint in safetensors.
        output: Folder to write; it must not exist.
        spec: How to upcycle.
        new_rows: Id of each token that the source never learned -> ids of the tokens whose rows' mean its row is, in
            embedding and head; both grow to a multiple of 128 rows where they must.
        merged: Those that stand in text for these tokens: their rows may lean to one side, see `leans`.
        save_tokenizer: Writes the tokenizer that has these tokens into the folder, in place of the source's own.
        overwrite: Replace an existing model folder, once the new one is complete.

    Raises:
        ValueError: When the source cannot be upcycled, the output exists, or another run is writing it.
    """
    output = Path(output).expanduser().resolve()
    refuse_output(output, overwrite)
    plan = _plan(source, spec, new_rows, merged)
    folder = plan.folder.resolve()
    if output == folder or output in folder.parents:
        raise ValueError(f"{output} holds the source: give another output folder.")
    entries = [entry for shard in plan.shards for entry in shard]
    files = {entry.stored.path: entry.stored.path.stat() for entry in entries}
    provenance = {
        "package": "agri-moe " + metadata.version("agri-moe"),
        "source": str(folder) if Path(source).expanduser().is_dir() else str(source),
        "spec": asdict(spec),
        "dtypes": sorted({entry.dtype for entry in entries}),
        "source_files": {path.name: {"bytes": s.st_size, "modified_ns": s.st_mtime_ns} for path, s in files.items()},
        "source_config": json.loads(plan.source.to_json_string(use_diff=False)),
    }
    if new_rows:
        provenance["new_rows"] = {str(token): list(pieces) for token, pieces in sorted(new_rows.items())}
    with new_checkpoint(output, provenance, overwrite=overwrite) as building:
        write_weights(building, plan.shards, partial(_pieces, spec=spec))
        copy_companions(folder, building, tokenizer=save_tokenizer is None)
        if save_tokenizer is not None:
            save_tokenizer(building)
        plan.config.save_pretrained(building)
        write_moe_config(building)
