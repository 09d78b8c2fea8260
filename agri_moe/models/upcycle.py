"""Upcycling: a dense checkpoint becomes a sparse one, tensor by tensor, without loading either whole.

Shapes: D model width, F expert width, E experts, K experts per token, G slices per copy, L layers,
V vocabulary.

Sources: Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055); Drop-Upcycling (Nakamura et al. 2025,
arXiv 2502.19261); granular experts and virtual groups (He et al. 2024, "Upcycling Large Language Models into
Mixture of Experts", arXiv 2410.07524).

Adding a family means adding rows to `FAMILIES`: names of the dense checkpoint on the left, of the MoE on the
right.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights

PROVENANCE = "upcycle.json"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Everything of the source that is neither weights nor config: the tokenizer and how to generate.
COMPANIONS = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "spiece.model", "generation_config.json",
)  # fmt: skip

Part = Literal["copy", "gate", "up", "down", "router"]


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
        for key in ("num_experts", "num_experts_per_tok", "granularity"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it must be at least 0.")
        for key in ("jitter", "router_std"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be a finite number, at least 0.")
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"drop_ratio is {self.drop_ratio}: it must lie between 0 and 1.")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: it must be at most num_experts, "
                f"{self.num_experts}."
            )
        for key in ("num_experts", "num_experts_per_tok"):
            if getattr(self, key) % self.granularity:
                raise ValueError(
                    f"{key} is {getattr(self, key)}: it must be a multiple of granularity, {self.granularity}."
                )
        if self.granularity > 1 and self.router_std == 0:
            # All rows equal: top-k would pick slices of different copies, and the sum would be no whole FFN.
            raise ValueError("router_std is 0: with granularity above 1 it must be positive, to tell the copies apart.")


@dataclass(frozen=True)
class Row:
    """One line of a key table: {l} is the layer, {e} the expert; `part` says what is done on the way."""

    dense: str | None
    moe: str
    part: Part = "copy"


_SAME_IN_ALL = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.{l}.input_layernorm.weight",
    "model.layers.{l}.post_attention_layernorm.weight",
    "model.layers.{l}.self_attn.q_proj.weight",
    "model.layers.{l}.self_attn.k_proj.weight",
    "model.layers.{l}.self_attn.v_proj.weight",
    "model.layers.{l}.self_attn.o_proj.weight",
)
_ONLY_QWEN3 = (
    "model.layers.{l}.self_attn.q_norm.weight",
    "model.layers.{l}.self_attn.k_norm.weight",
    "model.layers.{l}.self_attn.q_proj.bias",
    "model.layers.{l}.self_attn.k_proj.bias",
    "model.layers.{l}.self_attn.v_proj.bias",
    "model.layers.{l}.self_attn.o_proj.bias",
)
_QWEN3_ROWS = (
    *(Row(name, name) for name in _SAME_IN_ALL + _ONLY_QWEN3),
    Row("model.layers.{l}.mlp.gate_proj.weight", "model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "gate"),
    Row("model.layers.{l}.mlp.up_proj.weight", "model.layers.{l}.mlp.experts.{e}.up_proj.weight", "up"),
    Row("model.layers.{l}.mlp.down_proj.weight", "model.layers.{l}.mlp.experts.{e}.down_proj.weight", "down"),
    Row(None, "model.layers.{l}.mlp.gate.weight", "router"),
)
_MIXTRAL = "model.layers.{l}.block_sparse_moe."
_MIXTRAL_ROWS = (
    *(Row(name, name) for name in _SAME_IN_ALL),
    Row("model.layers.{l}.mlp.gate_proj.weight", _MIXTRAL + "experts.{e}.w1.weight", "gate"),
    Row("model.layers.{l}.mlp.up_proj.weight", _MIXTRAL + "experts.{e}.w3.weight", "up"),
    Row("model.layers.{l}.mlp.down_proj.weight", _MIXTRAL + "experts.{e}.w2.weight", "down"),
    Row(None, _MIXTRAL + "gate.weight", "router"),
)
# Where transformers v5 keeps the same tensors in memory, in all these MoEs: [E, 2F, D], [E, D, F], [E, D].
_FUSED: dict[Part, str] = {
    "gate": "model.layers.{l}.mlp.experts.gate_up_proj",
    "up": "model.layers.{l}.mlp.experts.gate_up_proj",
    "down": "model.layers.{l}.mlp.experts.down_proj",
    "router": "model.layers.{l}.mlp.gate.weight",
}
# Old Llama checkpoints store this buffer; it is computed from the config.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

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


FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        Qwen3MoeConfig,
        "Qwen3MoeForCausalLM",
        _QWEN3_ROWS,
        "moe_intermediate_size",
        config_keys=("attention_bias",),
    ),
    "llama": Family(
        MixtralConfig,
        "MixtralForCausalLM",
        _MIXTRAL_ROWS,
        "intermediate_size",
        refused=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        MixtralConfig,
        "MixtralForCausalLM",
        _MIXTRAL_ROWS,
        "intermediate_size",
        config_keys=("sliding_window",),
        refused=("attention_bias", "mlp_bias"),
    ),
}
MOE_ROWS = {family.moe.model_type: family.rows for family in FAMILIES.values()}


# ---- configs


def is_moe(config: PreTrainedConfig) -> bool:
    """Whether a config describes a mixture of experts."""
    return any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def moe_config(source: PreTrainedConfig, spec: UpcycleSpec) -> PreTrainedConfig:
    """The stock MoE config that a dense config becomes.

    Args:
        source: Config of a Qwen3, Llama or Mistral model.
        spec: How to upcycle it.

    Returns:
        A Qwen3MoeConfig or MixtralConfig with `norm_topk_prob` true: without it the weights of the chosen
        experts do not add up to 1, and copies of the FFN would not give the dense output.

    Raises:
        ValueError: When the family is unknown, or something of the source has no place in the MoE.
    """
    family = _family(source)
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
    values["rope_parameters"] = dict(source.rope_parameters)
    if family.moe is Qwen3MoeConfig:
        values |= _qwen3_values(source)
    values[family.width] = width // spec.granularity
    config = family.moe(
        **values,
        num_local_experts=spec.num_experts,
        num_experts_per_tok=spec.num_experts_per_tok,
        norm_topk_prob=True,
        output_router_logits=False,
    )
    config.architectures = [family.architecture]
    return config


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


def _family(config: PreTrainedConfig) -> Family:
    if is_moe(config):
        raise ValueError(f"The source is already a mixture of experts ({config.model_type}): give a dense model.")
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"The source is a {config.model_type} model: upcycling knows {', '.join(FAMILIES)}.")
    return family


def write_moe_config(folder: Path) -> None:
    """Patch `config.json` of a saved MoE so that readers other than transformers v5 understand it.

    v5 writes `num_local_experts`, `rope_parameters` and `dtype` only. Other readers look for `num_experts`,
    and silently take a `rope_theta` of 10,000 and float32 where the older names are absent. `norm_topk_prob`
    becomes explicit (absent means false to most readers); a value that the file gives is kept.

    Args:
        folder: A folder written by `save_pretrained`.

    Raises:
        ValueError: When the folder holds no readable config, or one without experts.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    experts = values.get("num_local_experts") or values.get("num_experts")
    if not experts:
        raise ValueError(f"{path} names no experts: it is not the config of a mixture of experts.")
    values["num_experts"] = values["num_local_experts"] = experts
    values.setdefault("norm_topk_prob", True)
    rope = values.get("rope_parameters")
    if rope and "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if values.get("dtype"):
        values["torch_dtype"] = values["dtype"]
    write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of an MoE: all of them, and those that one token visits (a tied head counts once)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return total, total - experts + experts * config.num_experts_per_tok // config.num_local_experts


# ---- reading


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own: mapped pages would count as memory used, file after file."""
        data = torch.empty(self.end - self.begin, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            _fill(file, data)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    def pieces(self, size: int = 1 << 23) -> Iterator[memoryview]:
        """The tensor's bytes, `size` at a time."""
        data = torch.empty(min(size, self.end - self.begin), dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            for start in range(self.begin, self.end, size):
                part = data[: min(size, self.end - start)]
                _fill(file, part)
                yield part.numpy().data


def _fill(file: Any, data: Tensor) -> None:
    view: memoryview[int] = data.numpy().data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{file.name} ends too early: it is damaged or still being written.")
        view = view[count:]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors checkpoint, by name, from the headers alone.

    Raises:
        ValueError: When there are no safetensors, or a file is missing or damaged.
    """
    index = folder / INDEX
    if index.is_file():
        paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        paths = [path for path in [folder / "model.safetensors"] if path.is_file()]
        paths = paths or sorted(folder.glob("*.safetensors"))
    if not paths:
        found = next(folder.glob("pytorch_model*.bin*"), None)
        reason = f"only {found.name}, whose format can run code" if found else "no weights"
        raise ValueError(f"{folder} holds {reason}: give a checkpoint saved as safetensors.")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _header(path).items():
            if name in tensors:
                raise ValueError(f"{path} holds {name}, which {tensors[name].path.name} holds too: remove one of them.")
            tensors[name] = tensor
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the index names it, so the checkpoint is incomplete.")
    damaged = ValueError(f"{path} is no complete safetensors file: it is damaged or still being written.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged
        try:
            entries = json.loads(file.read(length))
            tensors = {
                name: StoredTensor(
                    path,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(8 + length + at for at in entry["data_offsets"]),
                )
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged from error
    for tensor in tensors.values():
        known = tensor.dtype in DTYPES
        if known and tensor.end - tensor.begin != math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize:
            raise damaged
    if size != max((tensor.end for tensor in tensors.values()), default=8 + length):
        raise damaged
    return tensors


def source_folder(source: str | Path, check: Callable[[PreTrainedConfig], object] = lambda config: None) -> Path:
    """The local folder of a checkpoint: the folder itself, or the snapshot of a Hugging Face name.

    Only safetensors, configs and tokenizer files are fetched, and no code of the repository is run.

    Args:
        source: Folder or Hugging Face name.
        check: Raises ValueError on a config of no use, before gigabytes of weights are fetched for it.

    Raises:
        ValueError: When there is neither such a folder nor such a repository within reach.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists():
        raise ValueError(f"{name} is a file: give the folder of a checkpoint or a Hugging Face name.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{name} does not exist: give a checkpoint folder or a Hugging Face name (Qwen/Qwen3-0.6B).")
    try:
        check(load_config(Path(snapshot_download(name, allow_patterns=["config.json"]))))
        # "model*": some repositories hold the same weights twice (consolidated.safetensors).
        wanted = ["config.json", "model*.safetensors", INDEX, *COMPANIONS]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} is neither a folder nor a Hugging Face repository within reach ({first}).") from error


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder; no code of the checkpoint is run.

    Raises:
        ValueError: When it is missing, unreadable, or of a type that transformers does not have.
    """
    values = read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, KeyError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder / 'config.json'} ({values.get('model_type')}) cannot be read: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; a ValueError names the file that is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder is not a Hugging Face checkpoint.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return values


# ---- planning


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its name and shape, and what it is made from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part
    stored: StoredTensor | None
    layer: int = -1
    expert: int = -1

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def fused(self) -> str:
        """Name of the parameter that holds it in memory."""
        return _FUSED.get(self.part, self.name).format(l=self.layer)


def expected_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a stock MoE checkpoint, weights per expert, as the stock model declares them.

    A tied head is left out. The names are those of hub checkpoints (`mlp.experts.E.gate_proj.weight`,
    `block_sparse_moe.experts.E.w1.weight`), not of the fused parameters that transformers v5 holds in memory.
    """
    rows = {row.part: row for row in MOE_ROWS[config.model_type]}
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del parameters["lm_head.weight"]
    expected: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        layer = match[1] if match else ""
        parts = [part for part, fused in _FUSED.items() if fused.format(l=layer) == name]
        if parts in ([], ["router"]):
            stored = rows["router"].moe.format(l=layer) if parts else name
            expected[stored] = tuple(parameter.shape)
            continue
        experts, height, width = parameter.shape
        for part in parts:  # gate and up share one parameter, gate first
            for expert in range(experts):
                expected[rows[part].moe.format(l=layer, e=expert)] = (height // len(parts), width)
    return expected


def _plan(folder: Path, source: PreTrainedConfig, config: PreTrainedConfig, spec: UpcycleSpec) -> list[list[Entry]]:
    """The tensors to write, one list per shard: what stands before the layers, each layer, what follows."""
    tensors = stored_tensors(folder)
    rows = {row.dense: row for row in _family(source).rows if row.dense}
    router = next(row for row in _family(source).rows if row.part == "router")
    expected = expected_tensors(config)
    shards: list[list[Entry]] = [[] for _ in range(config.num_hidden_layers + 2)]
    for name, stored in tensors.items():
        if _COMPUTED.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # a tied head is stored by some checkpoints; the embedding is what every reader uses
        match = re.match(r"model\.layers\.(\d+)\.", name)
        layer = int(match[1]) if match else -1
        row = rows.get(name.replace(f".layers.{layer}.", ".layers.{l}."))
        if row is None or layer >= config.num_hidden_layers:
            raise ValueError(f"{stored.path} holds {name}, which {config.architectures[0]} has no place for.")
        if stored.dtype not in DTYPES:
            raise ValueError(f"{stored.path} holds {name} as {stored.dtype}: upcycling takes {', '.join(DTYPES)}.")
        shard = shards[layer + 1] if match else shards[0 if "embed" in name else -1]
        for expert in range(spec.num_experts) if row.part != "copy" else [-1]:
            written = row.moe.format(l=layer, e=expert)
            if written not in expected:
                raise ValueError(f"{stored.path} holds {name}, which its config.json makes no use of.")
            whole = list(shape := expected[written])
            if row.part != "copy":  # slices are cut along F: rows of gate and up, columns of down
                whole[1 if row.part == "down" else 0] *= spec.granularity
            if tuple(whole) != stored.shape:
                raise ValueError(
                    f"{stored.path} holds {name} of shape {list(stored.shape)}: its config asks for {whole}."
                )
            shard.append(Entry(written, stored.dtype, shape, row.part, stored, layer, expert))
        if row.part == "gate":
            written = router.moe.format(l=layer)
            shard.append(Entry(written, stored.dtype, expected[written], "router", None, layer))
    missing = expected.keys() - {entry.name for shard in shards for entry in shard}
    if missing:
        raise ValueError(f"{folder} gives no tensor for {min(missing)} ({len(missing)} such): it is incomplete.")
    order: dict[Part, int] = {"copy": 0, "router": 1, "gate": 2, "up": 3, "down": 4}
    return [sorted(shard, key=lambda entry: (order[entry.part], entry.expert, entry.name)) for shard in shards if shard]


# ---- making


def _generator(spec: UpcycleSpec, entry: Entry, what: str) -> torch.Generator:
    """A generator of this tensor's own, so that order, threads and interruptions do not matter."""
    # torch's CPU generator keeps 32 bits of its seed: hashed places would collide now and then, so places
    # are counted from a hashed start.
    start = int.from_bytes(hashlib.blake2b(str(spec.seed).encode(), digest_size=4).digest(), "little")
    kinds = ("router", "dims", "gate", "up", "down")
    place = ((entry.layer + 1) * (spec.num_experts + 1) + entry.expert + 1) * len(kinds) + kinds.index(what)
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


def _expert(dense: Tensor, mean: float, std: float, entry: Entry, spec: UpcycleSpec) -> Tensor:
    """One expert's tensor out of the dense one: slice, scale, jitter, redraw.

    Args:
        dense: The FFN's tensor, gate or up [G F, D] or down [D, G F], float of 16 or 32 bits.
        mean: Mean of `dense`.
        std: Standard deviation of `dense`.
        entry: What to make.
        spec: How.

    Returns:
        [F, D], or [D, F] for down, in the dtype of `dense`; `dense` itself when there is nothing to do.
    """
    axis = 1 if entry.part == "down" else 0
    width = entry.shape[axis]
    out = dense.narrow(axis, entry.expert % spec.granularity * width, width).contiguous()
    if entry.part == "down" and spec.granularity > 1:
        # Each slice gets 1/G of its copy's share of the router's weight, so its output counts G times.
        # (He et al.'s cube-root scaling spreads G over three matrices around a nonlinearity: 20% off.)
        out, mean, std = out * spec.granularity, mean * spec.granularity, std * spec.granularity
    generator = _generator(spec, entry, entry.part)
    if spec.jitter and std:
        noisy = torch.empty_like(out)
        noise = torch.empty(min(1 << 18, out.numel()))  # 1 MB: stays in the cache through all four passes
        weight = torch.empty_like(noise)
        for source, target in zip(out.view(-1).split(noise.numel()), noisy.view(-1).split(noise.numel()), strict=True):
            count = source.numel()
            weight[:count].copy_(source)
            target.copy_(noise[:count].normal_(0.0, spec.jitter * std, generator=generator).add_(weight[:count]))
        out = noisy
    dropped = round(spec.drop_ratio * width)
    if dropped:
        dims = torch.randperm(width, generator=_generator(spec, entry, "dims"))[:dropped]
        shape = (dropped, out.shape[1]) if axis == 0 else (out.shape[0], dropped)
        fresh = torch.empty(shape).normal_(mean, std, generator=generator).to(out.dtype)
        out = out.clone().index_copy_(axis, dims, fresh)  # a clone: without jitter it is a view of `dense`
    return out


def _router(entry: Entry, spec: UpcycleSpec) -> Tensor:
    """Router rows [E, D]: one per copy of the FFN, shared by its G slices so that they are chosen together.

    In bf16 two *copies* tie on about one token in a thousand, and top-k may then mix their slices on it.
    """
    rows = torch.empty(spec.num_experts // spec.granularity, entry.shape[1])
    if spec.router_std:
        rows.normal_(0.0, spec.router_std, generator=_generator(spec, entry, "router"))
    else:
        rows.zero_()
    return rows.repeat_interleave(spec.granularity, 0).to(DTYPES[entry.dtype])


def _make(entries: Iterable[Entry], spec: UpcycleSpec) -> Iterator[tuple[Entry, Tensor]]:
    """The tensors of the entries, in their order; experts are made by a few threads, a few ahead."""
    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for (part, stored), group in groupby(entries, key=lambda entry: (entry.part, entry.stored)):
            if stored is None:
                yield from ((entry, _router(entry, spec)) for entry in group)
                continue
            dense = stored.read()
            if part == "copy":
                yield from ((entry, dense) for entry in group)
                continue
            mean, std = _statistics(dense) if spec.jitter or spec.drop_ratio else (0.0, 0.0)
            waiting: deque[tuple[Entry, Future[Tensor]]] = deque()
            for entry in group:
                waiting.append((entry, pool.submit(_expert, dense, mean, std, entry, spec)))
                if len(waiting) > threads:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            yield from ((ready, future.result()) for ready, future in waiting)


def upcycled_tensors(source: str | Path, spec: UpcycleSpec) -> Iterator[tuple[str, Tensor]]:
    """Stream the MoE's tensors under their checkpoint names, layer by layer, in the dtypes of the source.

    Args:
        source: Folder or Hugging Face name of a dense checkpoint in safetensors.
        spec: How to upcycle it.

    Yields:
        Name and tensor. With jitter 0 experts share memory: read them, do not write into them.

    Raises:
        ValueError: When the source cannot be upcycled.
    """
    folder = source_folder(source, partial(moe_config, spec=spec))
    dense = load_config(folder)
    for shard in _plan(folder, dense, moe_config(dense, spec), spec):
        for entry, tensor in _make(shard, spec):
            yield entry.name, tensor


def load_upcycled(source: str, spec: UpcycleSpec, *, dtype: torch.dtype) -> PreTrainedModel:
    """Upcycle in memory: bit for bit the model that `upcycle` and `from_pretrained` would give.

    Args:
        source: Folder or Hugging Face name of a dense checkpoint in safetensors.
        spec: How to upcycle it.
        dtype: Dtype of the parameters; the experts are made in the source's dtype and then cast.

    Returns:
        The stock MoE model, in eval mode as `from_pretrained` leaves it. Memory: the model and one tensor.

    Raises:
        ValueError: When the source cannot be upcycled.
    """
    folder = source_folder(source, partial(moe_config, spec=spec))
    dense = load_config(folder)
    config = moe_config(dense, spec)
    plan = _plan(folder, dense, config, spec)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters())
    entries = [entry for shard in plan for entry in shard]
    with torch.no_grad(), tqdm(total=len(entries), desc="upcycle", unit="tensor") as progress:
        for entry, tensor in _make(entries, spec):
            target = parameters[entry.fused].data
            if entry.expert >= 0:
                target = target[entry.expert]
            if entry.part in ("gate", "up"):  # fused as [2F, D], gate first
                target = target.chunk(2)[entry.part == "up"]
            target.copy_(tensor)
            progress.update()
    model.tie_weights()  # no_init_weights leaves a tied head untied
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


# ---- writing


def upcycle(source: str | Path, output: str | Path, spec: UpcycleSpec, *, overwrite: bool = False) -> None:
    """Write the upcycled checkpoint: one shard per layer, weights per expert, beside the source's tokenizer.

    The folder appears under its name only when it is complete; until then it is `OUTPUT.partial`. Run again
    after an interruption, it keeps finished shards and ends with the bytes of an unbroken run. Memory: one
    FFN matrix and a few experts' copies of it, whatever the size of the model.

    Args:
        source: Folder or Hugging Face name of a dense checkpoint in safetensors.
        output: Folder to write; it must not exist.
        spec: How to upcycle.
        overwrite: Replace an existing model folder, once the new one is complete.

    Raises:
        ValueError: When the source cannot be upcycled, the output exists, or another run is writing it.
    """
    output = Path(output).expanduser().resolve()
    _refuse_output(output, overwrite)
    folder = source_folder(source, partial(moe_config, spec=spec)).resolve()
    if output == folder or output in folder.parents:
        raise ValueError(f"{output} holds the source: give another output folder.")
    dense = load_config(folder)
    config = moe_config(dense, spec)
    plan = _plan(folder, dense, config, spec)
    building = output.with_name(output.name + ".partial")
    with _locked(building, output):
        _refuse_output(output, overwrite)  # again: another run may have finished in the meantime
        _continue_or_restart(building, _provenance(source, folder, dense, plan, spec))
        names = [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
        total = sum(entry.size for shard in plan for entry in shard)
        with tqdm(total=total, desc=f"upcycle to {output.name}", unit="B", unit_scale=True) as progress:
            for name, shard in zip(names, plan, strict=True):
                _write_shard(building / name, shard, spec, progress)
        weight_map = {entry.name: name for name, shard in zip(names, plan, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(building / INDEX, json.dumps(index, indent=2) + "\n")
        for path in sorted(folder.iterdir()):
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(path, building / path.name)
        config.save_pretrained(building)
        write_moe_config(building)
        _publish(building, output)


def _refuse_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists: give another output folder, or overwrite to replace it.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise ValueError(f"{output} is no model folder (no config.json): overwrite replaces model folders only.")


@contextmanager
def _locked(building: Path, output: Path) -> Iterator[None]:
    # Beside the folder and not in it: the folder is renamed. The system drops the lock of a killed process.
    path = building.with_name(building.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{output} is being written by another run: wait for it, or give another output."
            ) from error
        yield
        path.unlink()


def _provenance(
    source: str | Path, folder: Path, dense: PreTrainedConfig, plan: list[list[Entry]], spec: UpcycleSpec
) -> dict[str, Any]:
    stored = {entry.stored.path for shard in plan for entry in shard if entry.stored}
    return {
        "package": "agri-moe " + metadata.version("agri-moe"),
        "source": str(folder) if Path(source).expanduser().is_dir() else str(source),
        "spec": asdict(spec),
        "dtypes": sorted({entry.dtype for shard in plan for entry in shard}),
        "source_files": {
            path.name: {"bytes": path.stat().st_size, "sample_sha256": _sample(path)} for path in sorted(stored)
        },
        "source_config": json.loads(dense.to_json_string(use_diff=False)),
    }


def _sample(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """SHA-256 over the size and 64 evenly spaced blocks: reading 30 GB would cost as much as a copy."""
    total = path.stat().st_size
    digest = hashlib.sha256(str(total).encode())
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek(max(total - size, 0) * number // (blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def _continue_or_restart(building: Path, provenance: Mapping[str, Any]) -> None:
    text = json.dumps(provenance, indent=2, sort_keys=True) + "\n"
    path = building / PROVENANCE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        # Another source or another spec: none of its shards may be mixed with ours.
        if building.exists():
            shutil.rmtree(building)
        building.mkdir()
        write_atomically(path, text)


def _write_shard(path: Path, entries: list[Entry], spec: UpcycleSpec, progress: tqdm[Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size]
        }  # fmt: skip
        offset += entry.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the format asks for data aligned to 8 bytes
    if path.is_file() and path.stat().st_size == 8 + len(head) + offset:
        progress.update(offset)
        return  # written by an interrupted run: the name is given only after the last byte is on disk
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb", buffering=0) as file:
        _write_all(file, len(head).to_bytes(8, "little") + head)
        # Copies go piece by piece: an embedding can be larger than a layer.
        for copied, group in groupby(entries, key=lambda entry: entry.part == "copy"):
            if copied:
                for entry in group:
                    assert entry.stored is not None
                    for piece in entry.stored.pieces():
                        _write_all(file, piece)
                        progress.update(len(piece))
            else:
                for entry, tensor in _make(group, spec):
                    _write_all(file, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                    progress.update(entry.size)
        os.fsync(file.fileno())
    unfinished.replace(path)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):  # one system call writes at most 2 GiB
        view = view[file.write(view) :]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that its name never stands for half of it."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _publish(building: Path, output: Path) -> None:
    """Give the finished folder its name; a folder that it replaces goes only then."""
    replaced = output.with_name(output.name + ".replaced")
    if output.exists():
        if replaced.exists():  # left by a run that was killed right here
            shutil.rmtree(replaced)
        output.rename(replaced)
    building.rename(output)
    if replaced.exists():
        shutil.rmtree(replaced)
    descriptor = os.open(output.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
