"""A teacher's answers on disk: what a run needs of it to be trained without it.

    DIR/
        manifest.json        what the answers belong to, and the checksum of every other file; written last
        00000.arrow, ...     rows, one Arrow record batch in each file, mapped into memory
        tokenizer/           the teacher's, with its template, where it reads rows in a view of its own

A row is found by a hash of its tokens and segments, so that order, packing, batch size, epochs and splits are free. It
holds the teacher's answer at every position whose next token the teacher is asked for: some tokens of its distribution
with their log-probabilities and the mass of all others, or with how often they were drawn; its entropy; its most
probable token. Ids are kept in ascending order as gaps, log-probabilities in steps of 0.02 nats above the least;
every number is cut into byte planes, and each plane of a block of some rows compressed by itself.

Shapes: N positions of a row with an answer, K tokens of an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from agri_moe.data.chat import Chat, shown
from agri_moe.models.checkpoint_files import COMPANIONS, CONFIG, load_config
from agri_moe.models.litgpt import SETTINGS
from agri_moe.runs import replace_text

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
TOKENIZER = "tokenizer"
KEY = "model.teacher.cache"

# Rounding moves a log-probability by half a step, and renormalising by as much again: within 0.02 nats.
LOG_PROB_STEP = 0.02
# Of tail mass and entropy, of which there is one each: 0.0005 nats for two bytes.
FINE_STEP = 0.001
_NO_TAIL = 65535
_LARGEST = 65534  # -65.5 nats of tail, -1311 of a log-probability: nothing, in float32
# Rows are compressed together until they hold so many positions. Measured on rows of 11 and the 50 best of Zipf-like
# logits: 97 bytes for each position, 96 with 512, 127 where every row is a block of its own.
BLOCK_POSITIONS = 256
# Measured on the 50 best of Zipf-like logits: 1% smaller than level 3 at its speed; level 19 takes 1% more, and 5 times
# as long.
_CODEC = pa.Codec("zstd", compression_level=9)

_LARGEST_BLOCK = 1 << 28  # numbers of one field; a block ends with the row that fills it
_PIECES, _PIECE = 64, 1 << 16  # of a file of weights: samples, and bytes of each

Kind = Literal["topk", "sampled"]
View = Literal["same", "native", "no_thought"]
Ints = np.ndarray[Any, Any]  # int64
Floats = np.ndarray[Any, Any]  # float32


# ---- what is kept of an answer


class Answers(NamedTuple):
    """What the teacher says at the N positions of a row.

    `topk`: K tokens with their log-probabilities, and that of all others together. `sampled`: up to K distinct tokens
    and how often each was drawn, those drawn 0 times filling up; no tail.
    """

    positions_N: Ints  # ascending: the token after it is the one that is predicted
    ids_NK: Ints
    log_probs_NK: Floats | None  # nats
    counts_NK: Ints | None
    log_tail_N: Floats | None  # nats, -inf where no mass is left
    entropy_N: Floats  # nats
    top_N: Ints  # the most probable token
    whole_N: Floats | None = None  # nats, <= 0: of all pieces of the student's next token, where it has merged tokens

    def select(self, chosen: Any) -> Answers:
        """Some of the positions."""
        return Answers._make(None if array is None else array[chosen] for array in self)

    @classmethod
    def none(cls, kind: Kind, whole: bool = False) -> Answers:
        """Of a row at which the teacher is not asked."""
        ints, floats = np.zeros(0, np.int64), np.zeros(0, np.float32)
        ids = np.zeros((0, 1), np.int64)
        last = floats if whole else None
        if kind == "topk":
            return cls(ints, ids, np.zeros((0, 1), np.float32), None, floats, floats, ints, last)
        return cls(ints, ids, None, ids, None, floats, ints, last)


class Arrays(NamedTuple):
    """Answers as a loss wants them, of M positions; filled up with tokens at probability 0."""

    ids_MK: np.ndarray[Any, Any]  # int32, the most probable first
    probs_MK: Floats
    tail_M: Floats | None  # adds up to 1 with the probabilities
    entropy_M: Floats
    whole_M: Floats | None  # nats


def join(answers: Sequence[Answers]) -> Answers:
    """The answers of several rows, one after the other."""
    widest = max(row.ids_NK.shape[1] for row in answers)
    filling = {"ids_NK": 0, "counts_NK": 0, "log_probs_NK": -np.inf}
    columns = []
    for name, arrays in zip(Answers._fields, zip(*answers, strict=True), strict=True):
        if name in filling and arrays[0] is not None:
            arrays = tuple(_widened(array, widest, filling[name]) for array in arrays)
        columns.append(None if arrays[0] is None else np.concatenate(arrays))
    return Answers._make(columns)


def to_arrays(answers: Answers) -> Arrays:
    """Probabilities that add up to 1, the most probable token in front."""
    ids, top, tail = answers.ids_NK, answers.top_N, None
    if answers.counts_NK is not None:
        weights = answers.counts_NK.astype(np.float32)
        total = weights.sum(1)
    else:
        assert answers.log_probs_NK is not None, "one of the two"
        assert answers.log_tail_N is not None, "as the log-probabilities"
        weights, tail = np.exp(answers.log_probs_NK), np.exp(answers.log_tail_N)
        total = weights.sum(1) + tail
        tail = tail / total
    # Rounding moves it by a few hundredths; of a file that somebody else made it may be anything.
    likely = total > 0 if answers.counts_NK is not None else (total > 0.5) & (total < 2)
    if not likely.all():
        raise ValueError(f"{KEY}: the probabilities of a row do not add up to 1; make the cache anew.")
    probs = weights / total[:, None]
    # The most probable token goes to the front, and its own place is left as filling.
    is_top = (ids == top[:, None]) & (weights > 0)
    first = np.where(is_top, probs, 0).sum(1)
    probs[is_top] = 0
    ids = np.concatenate([top[:, None], ids], axis=1)
    probs = np.concatenate([first[:, None], probs], axis=1)
    return Arrays(ids.astype(np.int32), probs, tail, answers.entropy_N, answers.whole_N)


def _widened(array: Any, width: int, filling: float) -> Any:
    """[N, K] brought to [N, width]."""
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=filling)


# ---- a block of rows as bytes


FIELDS = {
    "topk": ("positions", "ids", "log_probs", "least", "tail", "entropy", "top"),
    "sampled": ("positions", "drawn", "ids", "counts", "entropy", "top"),
}
WHOLE = "whole"
"""One more, where the student has merged tokens."""


def encode(rows: Sequence[Answers]) -> dict[str, list[bytes]]:
    """The fields of a block of rows, each by its byte planes."""
    answers = join(rows)
    gaps = np.concatenate([np.diff(row.positions_N, prepend=0) for row in rows])
    numbers = {"positions": gaps, "entropy": _rounded(answers.entropy_N, FINE_STEP), "top": answers.top_N}
    if answers.whole_N is not None:
        numbers[WHOLE] = _rounded(-answers.whole_N, FINE_STEP)
    if answers.log_probs_NK is None:
        assert answers.counts_NK is not None, "one of the two"
        order = np.lexsort((answers.ids_NK, answers.counts_NK == 0))  # what fills up stands last
        ids, counts = (np.take_along_axis(a, order, 1) for a in (answers.ids_NK, answers.counts_NK))
        drawn = counts > 0
        numbers |= {"drawn": drawn.sum(1), "ids": np.diff(ids, axis=1, prepend=0)[drawn], "counts": counts[drawn]}
    else:
        assert answers.log_tail_N is not None, "as the log-probabilities"
        order = answers.ids_NK.argsort(1)
        ids, log_probs = (np.take_along_axis(a, order, 1) for a in (answers.ids_NK, answers.log_probs_NK))
        below = _rounded(-log_probs, LOG_PROB_STEP)
        least = below.max(1, initial=0)
        tail = np.where(np.isneginf(answers.log_tail_N), _NO_TAIL, _rounded(-answers.log_tail_N, FINE_STEP))
        numbers |= {"ids": np.diff(ids, axis=1, prepend=0), "log_probs": least[:, None] - below, "least": least}
        numbers |= {"tail": tail, "top": (ids == answers.top_N[:, None]).argmax(1)}  # its place takes less than its id
    return {name: _planes(array) for name, array in numbers.items()}


def decode(fields: Mapping[str, Sequence[Any]], kind: Kind, total: int, k: int, part: slice) -> Answers:
    """One row of what `encode` was given: log-probabilities, tail and entropy rounded, ids ascending.

    Args:
        fields: Planes by field.
        kind: As written.
        total: Positions of the block.
        k: Tokens at each, or draws.
        part: Which of the positions are the row's.

    Raises:
        ValueError: If it cannot be what `encode` gave; damage may show as another exception too.
    """
    positions = _numbers(fields["positions"], total, part).cumsum()
    entropy = (_numbers(fields["entropy"], total, part) * FINE_STEP).astype(np.float32)
    top, n = _numbers(fields["top"], total, part), part.stop - part.start
    whole = None
    if WHOLE in fields:
        whole = (_numbers(fields[WHOLE], total, part) * -FINE_STEP).astype(np.float32)
    if kind == "topk":
        every = slice(part.start * k, part.stop * k)
        ids = _numbers(fields["ids"], total * k, every).reshape(n, k).cumsum(1)
        above = _numbers(fields["log_probs"], total * k, every).reshape(n, k)
        below = _numbers(fields["least"], total, part)[:, None] - above
        if below.min(initial=0) < 0 or below.max(initial=0) > _LARGEST:
            raise ValueError("a log-probability is above 0, or too small to be one")
        log_probs = -LOG_PROB_STEP * below
        tail = _numbers(fields["tail"], total, part)
        log_tail = np.where(tail == _NO_TAIL, -np.inf, -FINE_STEP * tail).astype(np.float32)
        best = np.take_along_axis(ids, top[:, None], 1)[:, 0]
        return Answers(positions, ids, log_probs.astype(np.float32), None, log_tail, entropy, best, whole)
    sizes = _numbers(fields["drawn"], total, slice(0, total))
    if sizes.max(initial=0) > k:
        raise ValueError("more tokens than were drawn")
    ends = np.append(0, sizes.cumsum())
    every, own = slice(int(ends[part.start]), int(ends[part.stop])), sizes[part]
    drawn = np.arange(max(own.max(initial=0), 1)) < own[:, None]
    gaps, counts = (np.zeros(drawn.shape, np.int64) for _ in range(2))
    gaps[drawn] = _numbers(fields["ids"], int(ends[-1]), every)
    counts[drawn] = _numbers(fields["counts"], int(ends[-1]), every)
    return Answers(positions, np.where(drawn, gaps.cumsum(1), 0), None, counts, None, entropy, top, whole)


def _rounded(values: Floats, step: float) -> Ints:
    return np.rint(np.clip(values.astype(np.float64) / step, 0, _LARGEST)).astype(np.int64)


def _planes(numbers: Ints) -> list[bytes]:
    """The byte planes of numbers below 2^32, the low one first, as many as they need; each compressed if that helps."""
    flat = np.ascontiguousarray(numbers.reshape(-1), dtype="<u4")
    by_byte = flat.view(np.uint8).reshape(-1, 4)
    needed = max(1, -(-int(flat.max(initial=0)).bit_length() // 8))
    planes = []
    for byte in range(needed):
        plane = by_byte[:, byte].tobytes()
        packed = _CODEC.compress(plane, asbytes=True)
        planes.append(packed if len(packed) < len(plane) else plane)
    return planes


def _numbers(planes: Sequence[Any], count: int, part: slice) -> Ints:
    """Some of the numbers that `_planes` was given."""
    by_byte = np.zeros((part.stop - part.start, 4), np.uint8)
    for byte, plane in enumerate(planes):
        packed = plane if len(plane) == count else _CODEC.decompress(plane, count, asbytes=True)
        by_byte[:, byte] = np.frombuffer(packed, np.uint8)[part]
    return by_byte.reshape(-1).view("<u4").astype(np.int64)


def row_key(input_ids: Any, segment_ids: Any) -> int:
    """What a row is found by: 64 bits of a hash of its tokens and segments.

    Among a million rows two share one with a probability of 3e-8.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(input_ids, dtype="<i4").tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(segment_ids, dtype="<i1").tobytes())
    return int.from_bytes(digest.digest(), "little")


def row_keys(table: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The keys of a table of tokenised rows (`Rows.table`), in its order."""
    keys: list[int] = []
    for part in table.select_columns(["input_ids", "segment_ids"]).with_format("arrow").iter(batch_size=1000):
        both = zip(part["input_ids"], part["segment_ids"], strict=True)
        keys += [row_key(ids.values.to_numpy(), segments.values.to_numpy()) for ids, segments in both]
    return np.array(keys, dtype=np.uint64)


# ---- what a cache belongs to


def tokenizer_fingerprint(chat: Chat) -> str:
    """Hash of the tokenizer with its markers."""
    return hashlib.sha256(chat.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def template_fingerprint(chat: Chat) -> str:
    """Hash of the strings that frame a row."""
    return hashlib.sha256(repr(asdict(chat.format)).encode()).hexdigest()


def teacher_fingerprint(source: str) -> str:
    """Names a model in a moment: its commit on the hub, or a hash of a folder's settings and of samples of its weights.

    Raises:
        ValueError: If there is no such model.
    """
    config = load_config(source, "model.teacher.source")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return f"{source}@{config._commit_hash}"
    digest = hashlib.sha256()
    small = (CONFIG, SETTINGS, *COMPANIONS)
    for path in sorted(path for pattern in small for path in folder.glob(pattern) if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(path for end in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{end}")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(piece * max(size - _PIECE, 0) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


# ---- the folder


@dataclass(frozen=True)
class Header:
    """What a cache is of. A cache whose header is another's is another cache.

    Attributes:
        kind: `topk` or `sampled`.
        tokens: Tokens of an answer, or draws.
        seed: Of the draws.
        vocabulary: Over so many tokens, the first of the vocabulary, the teacher's distributions are taken.
        segments: Segments whose tokens the teacher was asked for.
        view: What the teacher read of a row.
        teacher: Fingerprint of the model.
        teacher_source: Where it came from.
        dtype: Of its weights.
        tokenizer: Hash of the tokenizer of the rows.
        template: Hash of the markers and headers that frame a row.
        rows: Hash of all rows, in the order in which they were asked.
        format: Of the files.
    """

    kind: Kind
    tokens: int
    seed: int
    vocabulary: int
    segments: list[str]
    view: View
    teacher: str
    teacher_source: str
    dtype: str
    tokenizer: str
    template: str
    rows: str
    format: int = FORMAT

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first field that differs, with both values; None if none does."""
        for name, value in asdict(self).items():
            if other.get(name) != value:
                return f"{name} ({_short(other.get(name))}, and not {_short(value)})"
        return None


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"{number:05d}.arrow"


def write_shard(path: Path, kind: Kind, rows: Iterable[tuple[int, Answers]], whole: bool = False) -> None:
    """Write rows, by key and answers, to one file; its name is given only after the last byte is on disk.

    Args:
        path: Of the file.
        kind: Of the answers.
        rows: All with `whole_N`, or all without.
        whole: Whether they have it.
    """
    schema = _schema(kind, whole)
    columns: dict[str, list[Any]] = {field.name: [] for field in schema}
    for block in _blocks(rows):
        answers = [row for _, row in block]
        columns["rows"].append([key for key, _ in block])
        columns["lengths"].append([len(row.positions_N) for row in answers])
        for name, planes in encode(answers).items():
            columns[name].append(planes)
    batch = pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema)
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _schema(kind: Kind, whole: bool) -> Any:
    """Of a shard; one element of each list is a block."""
    return pa.schema(
        [("rows", pa.list_(pa.uint64())), ("lengths", pa.list_(pa.int32()))]
        + [(name, pa.list_(pa.binary())) for name in (*FIELDS[kind], *[WHOLE] * whole)]
    )


def _blocks(rows: Iterable[tuple[int, Answers]]) -> Iterator[list[tuple[int, Answers]]]:
    """Rows, as many together as make a block."""
    block: list[tuple[int, Answers]] = []
    held = 0
    for row in rows:
        block.append(row)
        held += len(row[1].positions_N)
        if held >= BLOCK_POSITIONS:
            yield block
            block, held = [], 0
    if block:
        yield block


def finish(folder: Path, header: Header, shards: int) -> None:
    """Write the manifest: from now on the cache counts."""
    for left in folder.glob("*.partial"):  # by a process that was killed
        left.unlink()
    names = [shard_name(number) for number in range(shards)]
    if (folder / TOKENIZER).is_dir():
        names += sorted(f"{TOKENIZER}/{path.name}" for path in (folder / TOKENIZER).iterdir())
    files: dict[str, Any] = {}
    for name in names:
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        if name.endswith(".arrow"):
            lengths = _open_shard(path, header.kind, header.tokens).column("lengths").flatten().to_numpy()
            files[name] |= {"rows": len(lengths), "positions": int(lengths.sum())}
    content = asdict(header) | {"files": files}
    replace_text(folder / UNFINISHED, json.dumps(content, indent=1) + "\n")
    (folder / UNFINISHED).replace(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete cache.

    Raises:
        ValueError: If there is none that can be used.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / UNFINISHED).is_file():
            raise ValueError(f"{KEY}: {folder} is unfinished; run the cache command that began it once more.")
        raise ValueError(f"{KEY}: {folder} holds no {MANIFEST}; name a folder that the cache command has written.")
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
        lacking = sorted(Header.__dataclass_fields__.keys() - content.keys())
        wrong = "lacks " + lacking[0] if lacking else _wrong_header(content) or _wrong_files(content["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"cannot be read ({type(error).__name__}: {shown(str(error))})"
    if wrong:
        raise ValueError(f"{KEY}: {folder / MANIFEST} {wrong}; make the cache anew.")
    if content["format"] != FORMAT:
        raise ValueError(f"{KEY}: {folder} has format {content['format']}, and not {FORMAT}; make the cache anew.")
    return content


def _wrong_header(content: Mapping[str, Any]) -> str:
    """What is wrong with what it says that the answers are; whether that is what a run needs, the run knows."""
    if content["format"] == FORMAT and content["kind"] not in FIELDS:
        return f"names the kind {shown(str(content['kind']))}, which is none of {', '.join(FIELDS)}"
    for name in ("tokens", "vocabulary"):
        if type(content[name]) is not int or not 1 <= content[name] < 1 << 31:
            return f"says {name} {shown(str(content[name]))}, which is no number of them"
    return ""


def _wrong_files(files: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with the list of files: none may lie outside the folder."""
    for name, told in files.items():
        if not re.fullmatch(rf"\d{{5,}}\.arrow|{TOKENIZER}/\w[\w.-]*", name):
            return f"names {name!r}, which is no file of a cache"
        if not {"bytes", "sha256"} <= told.keys():
            return f"lacks the checksum of {name}"
    return ""


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Says of whatever goes wrong in reading a shard that it is damaged: its checksum may be right all the same."""
    try:
        yield
    except (ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        reason = shown(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
        raise ValueError(f"{KEY}: {path} is damaged ({reason.rstrip('.')}); make the cache anew.") from error


def _open_shard(path: Path, kind: Kind, tokens: int) -> Any:
    """The record batch of a shard, mapped, if its columns are what `write_shard` writes, and of a size to be held."""
    with _telling(path):
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if file.num_record_batches != 1 or file.schema not in (_schema(kind, False), _schema(kind, True)):
            raise ValueError("it holds other columns")
        batch = file.get_batch(0)
        batch.validate(full=True)
        if any(column.null_count or column.flatten().null_count for column in batch.columns):
            raise ValueError("something is missing in it")
        rows, lengths = batch.column("rows"), batch.column("lengths")
        if not rows.value_lengths().equals(lengths.value_lengths()):
            raise ValueError("it has lengths of other rows")
        if lengths.flatten().to_numpy().min(initial=0) < 0:
            raise ValueError("a row has a negative length")
        total = np.bincount(lengths.value_parent_indices().to_numpy(), lengths.flatten().to_numpy())
        if total.max(initial=0) * tokens > _LARGEST_BLOCK:
            raise ValueError("a block of it is too large")
        return batch


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LogitCache:
    """A complete cache, opened to be read.

    The manifest is read at once; the files are checked and mapped when first needed, or by `verify`.

    Args:
        folder: Where it lies.

    Raises:
        ValueError: If the folder holds no complete cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.header = Header(**{name: self.manifest[name] for name in Header.__dataclass_fields__})

    def check(self, **expected: Any) -> None:
        """Refuse a cache that is not what the run needs.

        Args:
            **expected: Fields of the header as the run has them.

        Raises:
            ValueError: Naming the first that differs.
        """
        for name, value in expected.items():
            own = getattr(self.header, name)
            if own != value:
                raise ValueError(
                    f"{KEY}: {self.folder} was made with another {name} ({_short(own)}; this run has "
                    f"{_short(value)}): make it anew from this run's config with the cache command."
                )

    def verify(self) -> None:
        """Check every file against its checksum, once.

        Raises:
            ValueError: Naming the file that is missing or damaged.
        """
        _ = self._shards

    @cached_property
    def _shards(self) -> list[Any]:
        files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        with ThreadPoolExecutor() as threads:
            for name, problem in zip(files, threads.map(self._damage, files.items()), strict=True):
                if problem:
                    raise ValueError(f"{KEY}: {self.folder / name} {problem}; restore it, or make the cache anew.")
        shards = [self.folder / name for name in files if name.endswith(".arrow")]
        return [_open_shard(path, self.header.kind, self.header.tokens) for path in shards]

    def _damage(self, file: tuple[str, Mapping[str, Any]]) -> str:
        name, told = file
        path = self.folder / name
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != told["bytes"] or _sha256(path) != told["sha256"]:
            return "is damaged (it has another checksum)"
        return ""

    @cached_property
    def _index(self) -> tuple[np.ndarray[Any, Any], Ints]:
        """Keys in ascending order, and where each stands (see `find`)."""
        keys, places = [np.zeros(0, np.uint64)], [np.zeros((0, 5), np.int64)]
        for number, shard in enumerate(self._shards):
            rows, lengths = (shard.column(name).flatten().to_numpy() for name in ("rows", "lengths"))
            block = shard.column("rows").value_parent_indices().to_numpy()
            total = np.bincount(block, lengths).astype(np.int64)
            end = lengths.cumsum() - (total.cumsum() - total)[block]
            keys.append(rows)
            places.append(np.stack([np.full(len(rows), number), block, end - lengths, end, total[block]], axis=1))
        joined = np.concatenate(keys)
        order = joined.argsort()
        return joined[order], np.concatenate(places)[order]

    def __len__(self) -> int:
        """Rows."""
        return len(self._index[0])

    def find(self, keys: np.ndarray[Any, Any]) -> Ints:
        """[rows, 5] of each key: shard, block in it, first position and last but one in that, positions of the block.

        -1 where the cache does not have it.
        """
        known, places = self._index
        if not len(known):
            return np.full((len(keys), 5), -1)
        at = np.searchsorted(known, keys).clip(max=len(known) - 1)
        return np.where((known[at] == keys)[:, None], places[at], -1)

    def check_rows(self, keys: np.ndarray[Any, Any], what: str) -> None:
        """Refuse rows that the teacher was not asked about.

        Args:
            keys: From `row_keys`.
            what: The setting that gave the rows.

        Raises:
            ValueError: If there is one.
        """
        missing = np.flatnonzero(self.find(keys)[:, 0] < 0)
        if len(missing):
            raise ValueError(
                f"{KEY}: {self.folder} was made with other rows: {len(missing)} of the {len(keys)} of {what} are not "
                f"in it (the first is row {missing[0]}); make it anew from this run's config with the cache command."
            )

    def read(self, key: int) -> Answers:
        """The answers of a row.

        Raises:
            ValueError: If it has none, or they cannot be what was written.
        """
        (place,) = self.find(np.array([key], np.uint64)).tolist()
        if place[0] < 0:
            raise ValueError(f"{KEY}: {self.folder} was made with other rows: one of this run's is not in it.")
        return self._decode(*place)

    def __iter__(self) -> Iterator[tuple[int, Answers]]:
        """Every row with its key, in the order of the files."""
        keys, places = self._index
        for row in np.lexsort(places.T[[2, 3, 1, 0]]):
            yield int(keys[row]), self._decode(*places[row].tolist())

    def _decode(self, shard: int, block: int, start: int, end: int, total: int) -> Answers:
        batch, kind = self._shards[shard], self.header.kind
        with _telling(self.folder / shard_name(shard)):
            names = [name for name in batch.schema.names if name not in ("rows", "lengths")]
            fields = {name: [plane.as_buffer() for plane in batch.column(name)[block].values] for name in names}
            answers = decode(fields, kind, total, self.header.tokens, slice(start, end))
            if max(answers.ids_NK.max(initial=0), answers.top_N.max(initial=0)) >= self.header.vocabulary:
                raise ValueError("it names a token outside the vocabulary")
        return answers
