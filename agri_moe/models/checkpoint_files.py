"""Checkpoint folders: found, read tensor by tensor, written shard by shard. What a tensor means is not known here.

Reading is the safetensors library's. Writing is not: `save_file` wants a whole shard in memory, and each of its
tensors in memory of its own, where a jitter of 0 makes one tensor serve all experts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig

from agri_moe.data.merges import PIECES_FILE
from agri_moe.models import shared_core  # noqa: F401  (the Auto classes then read its format)
from agri_moe.runs import replace_text

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LITGPT = "lit_model.pth"
PROVENANCE = "upcycle.json"
GENERATION_CONFIG = "generation_config.json"
# Everything of a checkpoint that is neither weights nor config: the tokenizer and how to generate.
COMPANIONS = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "spiece.model", GENERATION_CONFIG, PIECES_FILE,
)  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# "model*": some repositories hold the same weights twice (consolidated.safetensors).
CHECKPOINT = (CONFIG, "model*.safetensors", INDEX, *COMPANIONS)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a file. Each read opens the file: mapped pages count as memory until the mapping is gone."""

    path: Path

    def read(self) -> Tensor:
        """The tensor, mapped from the file."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)

    def pieces(self, size: int = 1 << 23) -> Iterator[Tensor]:
        """The tensor in runs of rows, about `size` bytes each: an embedding can be larger than a layer."""
        rows = max(1, size * self.shape[0] // self.size)
        for start in range(0, self.shape[0], rows):
            with safe_open(self.path, "pt") as file:
                yield file.get_slice(self.name)[start : start + rows]


@dataclass(frozen=True)
class MappedTensor(StoredTensor):
    """A tensor of a LitGPT checkpoint, a single file that is mapped once for all: its table is slow to read."""

    tensor: Tensor = field(compare=False)

    def read(self) -> Tensor:
        """The tensor, mapped from the file."""
        return self.tensor

    def pieces(self, size: int = 1 << 23) -> Iterator[Tensor]:
        """The tensor in runs of rows, about `size` bytes each."""
        yield from self.tensor.split(max(1, size * self.shape[0] // self.size))


NewRows = Mapping[int, Sequence[int]]
"""Id of each token that a model never learned -> ids of those out of whose rows its own starts."""


def leans(tied: bool) -> tuple[float, float]:
    """How rows of merged tokens lean, in embedding and head, see `start_row`.

    In a matrix that is both they are the mean (Gee et al. 2022, "Fast Vocabulary Transfer for Language Model
    Compression"). With a head of its own the embedding leans to the last piece, which is read last, and the head to the
    first, which is predicted first: as Nakash et al. 2025, "AdaptiVocab", weight them exponentially. Measured by
    benchmarks/hindi_tokens.py --starts.
    """
    return (0.0, 0.0) if tied else (1.0, -1.0)


def start_row(pieces_KD: Tensor, lean: float = 0.0) -> Tensor:
    """A new row [D], float32, out of those of what its token is made of.

    Args:
        pieces_KD: In their order in text.
        lean: The row at place j has a share in proportion to e^(lean j): 0 is the mean.
    """
    shares_K = (lean * torch.arange(len(pieces_KD), dtype=torch.float32, device=pieces_KD.device)).softmax(0)
    return (shares_K[:, None] * pieces_KD.float()).sum(0)


def grown(rows: int, new_rows: NewRows) -> int:
    """Rows of an embedding with room for new tokens: as many, or the next multiple of 128."""
    needed = 1 + max(new_rows)
    return rows if needed <= rows else 128 * math.ceil(needed / 128)


@dataclass(frozen=True)
class ExtendedTensor(StoredTensor):
    """An embedding or a head with rows for tokens that it never learned.

    Rows that only fill it up are the mean of the old ones, a token like any other: at 0 they would have the logit 0,
    which may be a high one.
    """

    stored: StoredTensor
    new_rows: NewRows = field(compare=False)
    leans: Mapping[int, float] = field(compare=False)

    @classmethod
    def of(cls, stored: StoredTensor, rows: int, new_rows: NewRows, leans: Mapping[int, float]) -> ExtendedTensor:
        """A stored tensor brought to so many rows; the new ones lean, see `start_row`, or are the mean."""
        return cls(stored.name, stored.dtype, (rows, *stored.shape[1:]), stored.path, stored, new_rows, leans)

    def read(self) -> Tensor:
        """The tensor, in memory."""
        return torch.cat(list(self.pieces()))

    def pieces(self, size: int = 1 << 23) -> Iterator[Tensor]:
        """The tensor in runs of rows, about `size` bytes each."""
        old = self.stored.read()
        made = {
            token: start_row(old[list(parts)], self.leans.get(token, 0.0)).to(old.dtype)
            for token, parts in self.new_rows.items()
        }
        start, total = 0, torch.zeros(self.shape[1:], dtype=torch.float64)
        for piece in self.stored.pieces(size):
            total += piece.double().sum(0)
            yield self._with(made, start, piece)
            start += len(piece)
        if start < self.shape[0]:
            mean = (total / start).to(old.dtype)
            yield self._with(made, start, mean.expand(self.shape[0] - start, -1))

    @staticmethod
    def _with(made: Mapping[int, Tensor], start: int, piece: Tensor) -> Tensor:
        """A run of rows with the new ones among them."""
        own = [token for token in made if start <= token < start + len(piece)]
        if own:
            piece = piece.clone(memory_format=torch.contiguous_format)
            for token in own:
                piece[token - start] = made[token]
        return piece


T = TypeVar("T", bound=TensorInfo)


# ---- reading


def checkpoint_folder(source: str | Path, patterns: Sequence[str] = CHECKPOINT) -> Path:
    """The local folder of a checkpoint: the folder itself, or the snapshot of a Hugging Face name.

    Args:
        source: Folder or Hugging Face name.
        patterns: Files to fetch from the hub; by default weights, config and tokenizer, and no code.

    Raises:
        ValueError: When there is neither such a folder nor such a repository within reach, or it has no config.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder of a checkpoint or a Hugging Face name.")
    if not path.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise ValueError(
                f"{name} does not exist: give a checkpoint folder or a Hugging Face name (Qwen/Qwen3-0.6B)."
            )
        try:
            path = Path(snapshot_download(name, allow_patterns=list(patterns)))
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"{name} is neither a folder nor a Hugging Face repository within reach ({_first_line(error)})."
            ) from error
    if not is_litgpt(path):
        read_json(path / CONFIG)
    return path


def is_litgpt(source: str | Path) -> bool:
    """Whether `source` is a folder with a checkpoint of LitGPT in it (`models/litgpt.py`)."""
    return (Path(source).expanduser() / LITGPT).is_file()


def load_config(source: str | Path, key: str) -> PreTrainedConfig:
    """The Hugging Face config of a folder or hub name; no code of the checkpoint is run.

    Raises:
        ValueError: One sentence naming `key`, the setting that gave `source`, if there is none.
    """
    if is_litgpt(source):
        from agri_moe.models import litgpt  # which imports from here

        return litgpt.read_config(Path(source).expanduser())
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"{key}: {source} is no folder or hub name with a model in it ({_first_line(error)})."
        ) from error
    refuse_kernels(config, f"{key}: {source}")
    index = Path(source).expanduser() / INDEX
    if index.is_file():
        _files_of(index)
    return config


def refuse_kernels(config: PreTrainedConfig, where: str) -> None:
    """Refuse a config that names an attention kernel of the hub: transformers would fetch it and run its code.

    Raises:
        ValueError: Beginning with `where`.
    """
    kernel = str(config._attn_implementation)
    if "/" in kernel:
        raise ValueError(
            f"{where} names the attention kernel {kernel}, which is code from the hub: take attn_implementation out of "
            f"its {CONFIG}."
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


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


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, by name, from the headers alone; those of LitGPT under Hugging Face's names.

    Raises:
        ValueError: When there are no safetensors, or a file is missing or damaged.
    """
    if is_litgpt(folder):
        return _litgpt_tensors(folder)
    if (folder / INDEX).is_file():
        files = _files_of(folder / INDEX)
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        pickled = next(folder.glob("pytorch_model*.bin*"), None)
        reason = f"only {pickled.name}, whose format can run code" if pickled else "no weights"
        raise ValueError(f"{folder} holds {reason}: give a checkpoint saved as safetensors.")
    return {tensor.name: tensor for file in files for tensor in _header(folder / file)}


def _files_of(index: Path) -> list[str]:
    """The files that an index names, none of them outside its folder."""
    table = read_json(index).get("weight_map")
    files: list[Any] = list(table.values()) if isinstance(table, dict) else [None]
    for name in files:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{index} names {name!r}, which is no file of a checkpoint: write the checkpoint anew.")
    return sorted(set(files))


def _litgpt_tensors(folder: Path) -> dict[str, StoredTensor]:
    from agri_moe.models import litgpt  # which imports from here

    path = folder / LITGPT
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return {
        name: MappedTensor(name, codes.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), path, tensor)
        for name, tensor in litgpt.read_tensors(folder, litgpt.read_config(folder)).items()
    }


def _header(path: Path) -> list[StoredTensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the index names it, so the checkpoint is incomplete.")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return [StoredTensor(name, s.get_dtype(), tuple(s.get_shape()), path) for name, s in slices.items()]
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file: it is damaged or still being written.") from error


# ---- writing


def refuse_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError if a checkpoint must not be written to `output`."""
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists: give another output folder, or overwrite to replace it.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / CONFIG).is_file() and not is_litgpt(output)):
        raise ValueError(f"{output} is no model folder (no config.json): overwrite replaces model folders only.")


@contextmanager
def new_checkpoint(
    output: Path, provenance: Mapping[str, Any], *, overwrite: bool, name: str = PROVENANCE
) -> Iterator[Path]:
    """Give `OUTPUT.partial` to be filled; it becomes `output` at the end of the block, or stays after an error.

    Args:
        output: The folder to be.
        provenance: What the checkpoint is made from. A folder left by an interrupted run of the same provenance
            is continued, any other is emptied first.
        overwrite: Replace `output`, once the new folder is complete.
        name: File in the folder that holds the provenance.

    Raises:
        ValueError: When `output` exists, or another run is writing it.
    """
    building = output.with_name(output.name + ".partial")
    with _locked(building):
        refuse_output(output, overwrite)
        text = json.dumps(provenance, indent=2, sort_keys=True) + "\n"
        path = building / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            replace_text(path, text)
        yield building
        replaced = output.with_name(output.name + ".replaced")
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # left by a run that was killed right here
            output.rename(replaced)
        building.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(building: Path) -> Iterator[None]:
    # Beside the folder and not in it: the folder is renamed. The system drops the lock of a killed process.
    path = building.with_name(building.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{building} is being written by another run: wait for it, or give another output."
            ) from error
        yield
        path.unlink()


def write_weights(folder: Path, shards: Sequence[Sequence[T]], make: Callable[[Sequence[T]], Iterable[Tensor]]) -> None:
    """Write one safetensors file per shard, and the index; files that are complete are kept.

    Args:
        folder: Where to.
        shards: Per file, the tensors in the order of writing.
        make: Gives a shard's tensors in that order, whole or in pieces, as they are asked for.
    """
    total = sum(tensor.size for shard in shards for tensor in shard)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, desc=f"write {folder.stem}", unit="B", unit_scale=True) as progress:
        for number, shard in enumerate(shards, 1):
            path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(path, shard, make, progress)
            weight_map |= {tensor.name: path.name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    replace_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path, shard: Sequence[T], make: Callable[[Sequence[T]], Iterable[Tensor]], progress: tqdm[Any]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the format asks for data aligned to 8 bytes
    if path.is_file() and path.stat().st_size == 8 + len(head) + end:
        progress.update(end)
        return  # written by an interrupted run: the name is given only after the last byte is on disk
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for piece in make(shard):
            progress.update(file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def copy_companions(source: Path, target: Path, tokenizer: bool = True) -> None:
    """Copy tokenizer and generation config, or the latter alone."""
    patterns = COMPANIONS if tokenizer else (GENERATION_CONFIG,)
    for path in (path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        shutil.copyfile(path, target / path.name)
