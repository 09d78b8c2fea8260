"""Tokenised rows: the cache on disk, the policy on bad rows, the split by hash, the loader.

Shapes: S segments (5).

`ChatDataModule` and `TextDataModule` differ in how a raw row becomes tokens; the rest is the same, and here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from agri_moe.data.chat import Chat, ChatFormat
from agri_moe.data.groups import Groups, group_of, missing_group
from agri_moe.data.packing import SEGMENTS, PackedRows, StepSampler, count_targets, pack, step_loader
from agri_moe.data.sources import RawRow, Source, file_stamp, hub_dataset, read_rows
from agri_moe.data.teacher_view import TeacherRow, TeacherView

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

CACHE_VERSION = 1  # raise it when a row would be tokenised differently: older caches are then left alone

LISTED = 1000  # rejected rows of a stream that are kept by name, so that memory stays bounded

BadRows = Literal["error", "skip"]
Record = dict[str, Any]
Encode = Callable[[Chat, RawRow], list[Record]]


class Rejected(NamedTuple):
    """A row that is not used: its file, its number in that file (from 0), and why."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """Usable rows. The id of a row in a batch is its position here.

    Args:
        table: `datasets.Dataset` with input_ids, segment_ids and, for chat rows, their texts; teacher_ids and
            teacher_tokens if the teacher has a view of its own.
        lengths: [rows] tokens of each row.
        counts: [rows, 2, S] targets by segment, and those of them that the teacher is not asked for.
        places: [rows] the hash in [0, 1) of what must not stand in two splits.
        aligned: [rows, 2] tokens of the answer that align with the teacher's view, and tokens of the answer.
        groups: Which rows belong together, where the data module was told a column that says so.
    """

    table: Any
    lengths: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]
    aligned: np.ndarray[Any, Any] | None = None
    groups: Groups | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def none(cls) -> Rows:
        """No rows at all."""
        from datasets import Dataset

        table = Dataset.from_dict({"input_ids": [], "segment_ids": []})
        return cls(table, np.zeros(0, np.int64), np.zeros((0, 2, SEGMENTS), np.int64), np.zeros(0))

    def select(self, chosen: np.ndarray[Any, Any]) -> Rows:
        """The rows at these positions."""
        aligned = None if self.aligned is None else self.aligned[chosen]
        groups = None if self.groups is None else self.groups.select(chosen)
        arrays = (self.lengths[chosen], self.counts[chosen], self.places[chosen])
        return Rows(self.table.select(chosen), *arrays, aligned, groups)


class Loaded(NamedTuple):
    """What a split's sources hold: usable rows, rejected ones, and rows (of a text, documents) in all."""

    rows: Rows
    rejected: list[Rejected]
    total: int


def record(
    input_ids: list[int],
    segment_ids: list[int],
    control_ids: frozenset[int],
    key: str,
    teacher: TeacherRow | None = None,
) -> Record:
    """A usable row as it is stored; `key` is what must not stand in two splits."""
    counts = np.zeros((2, SEGMENTS), np.int64)
    if input_ids:
        counts = count_targets(input_ids, segment_ids, control_ids, None if teacher is None else teacher.tokens)
    read: Record = {}
    if teacher is not None:
        read = {"teacher_ids": teacher.input_ids, "teacher_tokens": teacher.tokens}
        read |= {"aligned": teacher.aligned, "answer": teacher.answer}
    return read | {
        "reason": "",
        "length": len(input_ids),
        "input_ids": input_ids,
        "segment_ids": segment_ids,
        "counts": counts.ravel().tolist(),
        # A hash of the text alone, without seed or order: a row keeps its side when others come and go.
        "place": int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64,
    }


def bad_record(reason: str, control_ids: frozenset[int], teacher: bool = False) -> Record:
    """A row that cannot be used."""
    return {**record([], [], control_ids, "", TeacherRow([], [], 0, 0) if teacher else None), "reason": reason}


def load(
    sources: list[Source],
    encode: Encode,
    signature: object,
    chat: Chat,
    tokenizer: str,
    *,
    texts: tuple[str, ...] = (),
    columns: set[str] | None = None,
    max_length: int,
    num_proc: int = 1,
    cache_dir: str | None = None,
    view: TeacherView | None = None,
    group_by: str | None = None,
) -> Loaded:
    """Tokenises the rows of the sources, or reads them from the cache, and tells usable rows from bad ones.

    The cache is keyed by what the result depends on, not by pickled code: files (size and time of change),
    tokenizer, format, `signature`, the teacher's view and `group_by`. `max_length` and `min_aligned` are not in it:
    changing them tokenises nothing anew.
    """
    import datasets

    if columns is not None and group_by is not None:
        columns = columns | {group_by.split(".")[0]}
    if not any(next(read_rows(source, columns=columns), None) for source in sources):
        return Loaded(Rows.none(), [], 0)  # datasets cannot write a table without rows
    digest = hashlib.sha256(chat.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((CACHE_VERSION, dataclasses.asdict(chat.format), signature)).encode())
    digest.update(repr([_stamp(source) for source in sources]).encode())
    if view is not None:
        digest.update(view.fingerprint(chat).encode())
    if group_by is not None:
        digest.update(repr(("group_by", group_by)).encode())
    many = num_proc > 1 and len(sources) > 1
    try:
        table = datasets.Dataset.from_generator(
            _records,
            features=_features(texts if group_by is None else (*texts, "group"), view is not None),
            cache_dir=cache_dir,
            gen_kwargs={
                "job": list(enumerate(sources)),
                "encode": encode,
                "columns": columns,
                "group_by": group_by,
                # Another process loads a tokenizer of its own; this one has it already.
                "chat": (tokenizer, chat.format) if many else chat,
            },
            num_proc=min(num_proc, len(sources)) if many else None,
            split=datasets.NamedSplit("tokenised"),
            fingerprint=digest.hexdigest()[:32],
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # a file that turns out damaged: its sentence, not a wrapper
            raise ValueError(str(error.__cause__)) from error
        for source in sources:  # another process hands on no cause: a damaged file tells it when it is read here
            deque(read_rows(source), maxlen=0)
        raise
    return _sort_out(table, sources, max_length, view)


def _stamp(source: Source) -> object:
    if source.kind == "hub":
        return source, hub_dataset(source.name)._fingerprint
    return source, file_stamp(source.name)


def _features(texts: tuple[str, ...], teacher: bool) -> Any:
    from datasets import Features, List, Value

    numbers = {"file": "int32", "row": "int64", "length": "int32", "place": "float64"}
    lists = {"input_ids": "int32", "segment_ids": "int8", "counts": "int32"}
    if teacher:
        numbers |= {"aligned": "int32", "answer": "int32"}
        lists |= {"teacher_ids": "int32", "teacher_tokens": "int32"}
    strings = {"reason": "string"} | dict.fromkeys(texts, "large_string")
    return Features(
        {name: Value(kind) for name, kind in (numbers | strings).items()}
        | {name: List(Value(kind)) for name, kind in lists.items()}
    )


def _records(
    job: list[tuple[int, Source]],
    encode: Encode,
    columns: set[str] | None,
    group_by: str | None,
    chat: Chat | tuple[str, ChatFormat],
) -> Iterator[Record]:
    """The records of some of the sources."""
    chat = chat if isinstance(chat, Chat) else Chat.load(*chat)
    for file, source in job:
        for raw in read_rows(source, columns=columns):
            records = encode(chat, raw)
            for one in records if group_by is None else _grouped(records, raw, group_by):
                yield {"file": file, "row": raw.number, **one}


def _grouped(records: list[Record], raw: RawRow, group_by: str) -> list[Record]:
    """The records of a row with its group; a row without one cannot be used."""
    group = group_of(raw.values, group_by)
    if group is None:
        records = [{**records[0], "reason": records[0]["reason"] or missing_group(group_by)}]
    return [{**one, "group": group} for one in records]


def _sort_out(table: Any, sources: list[Source], max_length: int, view: TeacherView | None) -> Loaded:
    """Usable and rejected rows of a table of records."""
    arrow = table.with_format("arrow")[:]
    column = {name: arrow[name].to_numpy() for name in ("file", "row", "length", "place")}
    reasons: dict[int, str] = {}
    aligned = None
    if view is not None:
        aligned = np.stack([arrow[name].to_numpy() for name in ("aligned", "answer")], axis=1)
        found = [too_little_aligned(a, n, view.min_aligned) for a, n in aligned.tolist()]
        reasons = {i: reason for i, reason in enumerate(found) if reason}
    reasons |= {i: reason for i, reason in enumerate(arrow["reason"].to_pylist()) if reason}
    reasons |= {i: too_long(n, max_length) for i, n in enumerate(column["length"].tolist()) if n > max_length}
    rejected = [Rejected(sources[column["file"][i]].name, int(column["row"][i]), reasons[i]) for i in sorted(reasons)]
    counts = [np.asarray(chunk.flatten()).reshape(-1, 2, SEGMENTS) for chunk in arrow["counts"].chunks]
    stacked = np.concatenate(counts) if counts else np.zeros((0, 2, SEGMENTS), np.int64)
    good = np.setdiff1d(np.arange(len(table)), np.array(list(reasons), dtype=np.int64))
    rows = Rows(table, column["length"], stacked, column["place"], aligned).select(good)
    if "group" in table.column_names:
        rows = dataclasses.replace(rows, groups=Groups.of(arrow["group"].take(good).to_pylist()))
    total = len(
        {*zip(column["file"].tolist(), column["row"].tolist(), strict=True)}
    )  # a text has several records a row
    return Loaded(rows, rejected, total)


def too_long(length: int, max_length: int) -> str:
    """The reason against a row of so many tokens, empty when it fits."""
    return f"row is {length} tokens long, more than data.max_length {max_length}" if length > max_length else ""


def too_little_aligned(aligned: int, answer: int, min_aligned: float) -> str:
    """The reason against a row of whose answer's tokens so many align with the teacher's view, or nothing."""
    if aligned >= min_aligned * answer:
        return ""
    return (
        f"only {100 * aligned / answer:.3g}% of its answer aligns with the teacher's view, less than "
        f"model.teacher.min_aligned {min_aligned:g}"
    )


def apply_policy(loaded: Loaded, key: str, policy: BadRows, max_skipped_share: float) -> str:
    """Stops on bad rows where the policy says so; else returns what to warn of, or nothing."""
    rejected, total = loaded.rejected, loaded.total
    if not total:
        raise ValueError(f"{key} names files without a row: name some that have rows.")
    if rejected and policy == "error":
        raise bad_row(rejected[0], len(rejected))
    if not len(loaded.rows):
        raise ValueError(f"{key}: none of its {total} rows can be used; the first is {rejected[0]}.")
    if len(rejected) > max_skipped_share * total:
        raise ValueError(
            f"{key}: {len(rejected)} of {total} rows cannot be used, more than data.max_skipped_share "
            f"{max_skipped_share:g} allows; the first is {rejected[0]}."
        )
    if not rejected:
        return ""
    kinds = Counter(_kind(r.reason) for r in rejected)
    listed = "; ".join(f"{n} x {kind}" for kind, n in kinds.most_common())
    return f"{key}: {len(rejected)} of {total} rows skipped ({listed}); `preview` lists them."


def _kind(reason: str) -> str:
    """The reason without the row's own number."""
    if "tokens long" in reason:
        return "longer than data.max_length"
    return "aligned by less than model.teacher.min_aligned" if "model.teacher.min_aligned" in reason else reason


def bad_row(row: Rejected, count: int = 1) -> ValueError:
    """One sentence for a row that stops the run."""
    more = f" ({count} such rows in all)" if count > 1 else ""
    return ValueError(f"{row}{more}; rows count from 0 within the file: mend the row, or set data.bad_rows: skip.")


def skip_streamed(row: Rejected, policy: BadRows, listed: list[Rejected]) -> None:
    """Stops on a bad row of a stream where the policy says so; else warns, and lists the row."""
    if policy == "error":
        raise bad_row(row)
    if row in listed or len(listed) == LISTED:
        return
    listed.append(row)
    rank_zero_warn(f"data.train: skipped {row}.")
    if len(listed) == LISTED:
        rank_zero_warn(f"data.train: {LISTED} rows skipped; more of them will not be listed.")


def hold_out(rows: Rows, share: float, key: str, what: str) -> tuple[Rows, Rows]:
    """Rows kept and rows held out, by the hash of what must not stand in both; neither side is empty."""
    if share <= 0:
        return rows, rows.select(np.array([], dtype=np.int64))
    places = rows.places
    if places.min() == places.max():
        raise ValueError(
            f"{key} holds one {what} only, so none can be held out: set data.validation, or data.validation_share: 0."
        )
    limit = min(max(share, places.min()), places[places < places.max()].max())
    held_out = places <= limit
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def packed_loader(
    rows: Rows,
    *,
    max_length: int,
    tokens_per_batch: int,
    pad_id: int,
    seed: int,
    shuffle: bool,
    num_workers: int,
    trainer: Trainer | None,
) -> DataLoader[Any]:
    """Packs the rows and plans their order: a function of (seed, epoch) when shuffled, fixed when not."""
    sampler = StepSampler(
        pack(rows.lengths, max_length, seed),
        rows.lengths,
        rows.counts,
        sequences_per_batch=max(1, tokens_per_batch // max_length),
        seed=seed,
        shuffle=shuffle,
        trainer=trainer,
    )
    return step_loader(PackedRows(rows.table, max_length, pad_id), sampler, num_workers)


def check_held_out(data: Any) -> None:
    """Refuses a stream from which rows would have to be held out."""
    if data.streaming and data.train and data.validation is None and data.validation_share > 0:
        raise ValueError("data.streaming holds out no rows by itself: set data.validation or data.validation_share: 0.")


def check_numbers(data: Any, length_key: str) -> None:
    """Refuses numbers that make no sense, by the name of their key."""
    length = getattr(data, length_key)
    if length < 8:
        raise ValueError(f"data.{length_key} is {length}: a sequence needs at least 8 tokens.")
    if data.tokens_per_batch < 1:
        raise ValueError(f"data.tokens_per_batch is {data.tokens_per_batch}: it must be at least 1.")
    if data.shuffle_buffer < 1:
        raise ValueError(f"data.shuffle_buffer is {data.shuffle_buffer}: it must be at least 1 row.")
    if not 0 <= data.validation_share < 1:
        raise ValueError(f"data.validation_share is {data.validation_share}: it must be at least 0 and below 1.")
    if data.bad_rows not in ("error", "skip"):
        raise ValueError(f"data.bad_rows is {data.bad_rows!r}: it must be error or skip.")
