"""From rows to micro-batches: packing, the order of an epoch, the totals of a step, and where a run resumes.

Shapes: B sequences of a micro-batch, T tokens of its longest sequence, U tokens of its longest sequence as the teacher
reads it, S segments (5).

A *sequence* is several rows laid end to end, at most `max_length` tokens. A *micro-batch* is what one rank
sees in one forward pass. An *optimizer step* is accumulate_grad_batches x world_size micro-batches. The
sampler plans whole steps, so every micro-batch carries the totals of its step, and a loss that divides by
them needs no communication between ranks. (Of streamed rows that is done in streaming.py.)
"""

from __future__ import annotations

import bisect
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from agri_moe.data.chat import Segment

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

SEGMENTS = len(Segment)
_MULTIPLE = 8  # T is rounded up to it: tensor cores want it, and fewer distinct shapes mean fewer recompilations


class PackedRow(NamedTuple):
    """A row with its id in the dataset."""

    row_id: int
    input_ids: np.ndarray[Any, Any]
    segment_ids: np.ndarray[Any, Any]
    teacher_ids: np.ndarray[Any, Any] | None = None  # the row as the teacher reads it, if that is something else
    teacher_tokens: np.ndarray[Any, Any] | None = None  # for each token its place in teacher_ids, or -1


@dataclass(frozen=True)
class StepTotals:
    """What the whole optimizer step holds, over all its micro-batches and all ranks."""

    targets: np.ndarray[Any, Any]  # [2, S]: targets by segment; those of them that the teacher is not asked for
    tokens: int
    batches: int  # micro-batches that hold at least one row


@dataclass(frozen=True)
class MicroBatch:
    """The plan of one rank's next forward pass: row ids, or the rows themselves when they are streamed."""

    sequences: list[list[int]] | list[list[PackedRow]]
    totals: StepTotals


def count_targets(
    input_ids: Sequence[int],
    segment_ids: Sequence[int],
    control_ids: frozenset[int],
    teacher_tokens: Sequence[int] | None = None,
) -> np.ndarray[Any, Any]:
    """[2, S] targets of a row by segment, and those the teacher is not asked for; its first token is no target.

    Control tokens are not asked for and, with `teacher_tokens` (see `PackedRow`), neither are targets that the teacher
    does not predict: it has no such token, or has it first.
    """
    segments = np.asarray(segment_ids[1:], dtype=np.int64)
    untaught = np.isin(input_ids[1:], list(control_ids))
    if teacher_tokens is not None:
        untaught |= np.asarray(teacher_tokens[1:], dtype=np.int64) <= 0
    counted = (segments, segments[untaught])
    return np.stack([np.bincount(which, minlength=SEGMENTS) for which in counted])


def pack(lengths: Sequence[int] | np.ndarray[Any, Any], max_length: int, seed: int = 0) -> list[list[int]]:
    """Best-fit decreasing: the rows of each sequence. Rows of one length are taken in a seeded order.

    O(n log n), and for each row one shift in the list of rooms that occur, which max_length bounds.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.max() > max_length or sizes.min() < 1):
        raise ValueError(f"rows of {sizes.min()} to {sizes.max()} tokens do not fit max_length {max_length}.")
    order = np.random.default_rng(seed).permutation(sizes.size)
    order = order[np.argsort(-sizes[order], kind="stable")]
    sequences: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> sequences with it
    rooms: list[int] = []  # the rooms that occur, ascending
    for row in order.tolist():
        size = int(sizes[row])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            sequences[chosen].append(row)
        else:
            room, chosen = max_length, len(sequences)
            sequences.append([row])
        left = room - size
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(chosen)
    return sequences


def collate(
    sequences: Sequence[Sequence[PackedRow]], totals: StepTotals, max_length: int, pad_id: int, teacher: bool = False
) -> dict[str, Tensor]:
    """The batch contract, [B, T] each; targets are shifted here, once, and never reach across rows.

    Rows that the teacher reads in a view of its own add teacher_input_ids and teacher_position_ids [B, U], the same
    rows in the same sequences, and teacher_tokens [B, T]: the flat place (b U + u) of the teacher's token with the same
    content, or -1. `teacher` adds these keys to a batch without rows too.

    Padding has position 0 at every token: transformers derives the block mask from `position_ids`, so each
    pad token is a row of its own and attends to itself alone (a fully masked row would give NaN).
    """
    longest = max((sum(len(row.input_ids) for row in rows) for rows in sequences), default=0)
    width = min(_rounded(longest), max(max_length, longest))
    shape = (max(len(sequences), 1), width)
    filled = {
        "input_ids": pad_id,
        "position_ids": 0,
        "segment_ids": int(Segment.PAD),
        "row_ids": -1,
        "target_ids": pad_id,
        "target_segments": int(Segment.PAD),
    }
    arrays = {name: np.full(shape, value, dtype=np.int64) for name, value in filled.items()}
    for b, rows in enumerate(sequences):
        start = 0
        for row_id, ids, segments, *_ in rows:
            end = start + len(ids)
            arrays["input_ids"][b, start:end] = ids
            arrays["position_ids"][b, start:end] = np.arange(len(ids))
            arrays["segment_ids"][b, start:end] = segments
            arrays["row_ids"][b, start:end] = row_id
            arrays["target_ids"][b, start : end - 1] = ids[1:]
            arrays["target_segments"][b, start : end - 1] = segments[1:]
            start = end
    if teacher or any(row.teacher_ids is not None for rows in sequences for row in rows):
        arrays |= _teacher_arrays(sequences, shape, pad_id)
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch["step_targets"] = torch.from_numpy(np.asarray(totals.targets, dtype=np.int64))
    batch["step_tokens"] = torch.tensor(totals.tokens)
    batch["step_batches"] = torch.tensor(totals.batches)
    return batch


def _teacher_arrays(
    sequences: Sequence[Sequence[PackedRow]], shape: tuple[int, int], pad_id: int
) -> dict[str, np.ndarray[Any, Any]]:
    """What the teacher reads of a batch [B, U], and where it has the student's tokens [B, T]."""
    # Within max_length are the student's sequences; the teacher's are as long as its template makes them.
    longest = max((sum(len(_as_read(row)[0]) for row in rows) for rows in sequences), default=0)
    width = _rounded(longest)
    ids = np.full((shape[0], width), pad_id, dtype=np.int64)
    positions = np.zeros((shape[0], width), dtype=np.int64)
    tokens = np.full(shape, -1, dtype=np.int64)
    for b, rows in enumerate(sequences):
        start = at = 0
        for row in rows:
            read, places = _as_read(row)
            end, after = start + len(row.input_ids), at + len(read)
            ids[b, at:after] = read
            positions[b, at:after] = np.arange(len(read))
            tokens[b, start:end] = np.where(places < 0, -1, places.astype(np.int64) + (b * width + at))
            start, at = end, after
    return {"teacher_input_ids": ids, "teacher_position_ids": positions, "teacher_tokens": tokens}


def _as_read(row: PackedRow) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    assert row.teacher_ids is not None, "a batch is read in one view"
    assert row.teacher_tokens is not None
    return row.teacher_ids, row.teacher_tokens


def _rounded(length: int) -> int:
    return max(-(-length // _MULTIPLE), 1) * _MULTIPLE


class PackedRows(Dataset[dict[str, Tensor]]):
    """Turns planned micro-batches into tensors.

    Args:
        table: A `datasets.Dataset` with `input_ids` and `segment_ids`, and `teacher_ids` and `teacher_tokens` if the
            teacher has a view of its own; or None when plans carry the rows.
        max_length: Longest sequence.
        pad_id: Token id of padding.
        teacher: Without a table, whether the rows are for a teacher with a view of its own.
    """

    def __init__(self, table: Any | None, max_length: int, pad_id: int, teacher: bool = False) -> None:
        self.teacher = teacher if table is None else "teacher_ids" in table.column_names
        self.columns = [name for name in PackedRow._fields[1:] if self.teacher or not name.startswith("teacher_")]
        self.table = None if table is None else table.select_columns(self.columns).with_format("arrow")
        self.max_length = max_length
        self.pad_id = pad_id

    def __len__(self) -> int:
        return 0 if self.table is None else len(self.table)

    def __getitem__(self, plan: MicroBatch) -> dict[str, Tensor]:
        sequences = self._fetch(plan.sequences) if self.table is not None else plan.sequences
        return collate(sequences, plan.totals, self.max_length, self.pad_id, self.teacher)  # type: ignore[arg-type]

    def _fetch(self, sequences: Any) -> list[list[PackedRow]]:
        """Reads the rows of all sequences in one query."""
        wanted = [row for rows in sequences for row in rows]
        if not wanted:
            return []
        columns = self.table[wanted]  # type: ignore[index]
        arrays = ([value.values.to_numpy() for value in columns[name]] for name in self.columns)
        rows = iter(map(PackedRow, wanted, *arrays))
        return [[next(rows) for _ in sequence] for sequence in sequences]


class Place(NamedTuple):
    """Where this process stands among the ranks, and how many micro-batches it has done in all."""

    rank: int
    world_size: int
    accumulate: int
    done: int


class Origin(NamedTuple):
    """Where a run was taken up: its micro-batches by then, and epoch and sequences of it that all ranks had seen."""

    done: int = 0
    epoch: int = 0
    taken: int = 0


class StepSampler(Sampler[list[MicroBatch]]):
    """Plans epochs of packed sequences: the order is a function of (seed, epoch), and a run resumes exactly.

    Epoch and place in it are derived from the trainer's count of processed micro-batches, which Lightning
    restores with a checkpoint; how far the loader had read ahead does not matter. Those before `origin` may have been
    of another size, or on another number of ranks: what they left of their epoch is shared out anew. Without a trainer
    it plays epoch 0. A module in training that has `rows_again_after` gets the rows from the beginning every so many
    micro-batches.

    Args:
        sequences: Rows of each sequence, from `pack`.
        lengths: [rows] tokens of each row.
        counts: [rows, 2, S] targets of each row, from `count_targets`.
        sequences_per_batch: Sequences in one micro-batch.
        seed: Seed of the order.
        shuffle: Whether epochs differ in order; validation keeps the given one.
        trainer: Where ranks, accumulation, limits and progress are read from.

    Attributes:
        origin: Where micro-batches of the present size on the present ranks began.
    """

    def __init__(
        self,
        sequences: list[list[int]],
        lengths: np.ndarray[Any, Any],
        counts: np.ndarray[Any, Any],
        *,
        sequences_per_batch: int,
        seed: int = 0,
        shuffle: bool = True,
        trainer: Trainer | None = None,
    ) -> None:
        self.sequences = sequences
        self.sequences_per_batch = sequences_per_batch
        self.seed = seed
        self.shuffle = shuffle
        self.trainer = trainer
        self.origin = Origin()
        self._tokens = np.array([lengths[rows].sum() for rows in sequences], dtype=np.int64)
        shape = (len(sequences), 2, SEGMENTS)
        self._targets = np.array([counts[rows].sum(0) for rows in sequences], dtype=np.int64).reshape(shape)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on each rank; equal on all, so no rank waits for another in vain."""
        return -(-len(self.sequences) // self.slots)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        place = place_of(self.trainer, self.shuffle)
        length = self._planned()
        again = getattr(getattr(self.trainer, "lightning_module", None), "rows_again_after", None)
        if self.shuffle and again is not None and length:
            return self._replayed(place, length, again)
        epoch, taken, start = self._found(place.done)
        if getattr(self.trainer, "overfit_batches", 0.0):
            epoch = 0  # the same few batches again and again is what overfitting asks for
        plans = self.plan(epoch, place.rank, place.world_size, place.accumulate, taken)
        return iter([[plan] for plan in plans[start:]])

    def _found(self, done: int) -> tuple[int, int, int]:
        """Epoch, sequences of it that other micro-batches had taken, and micro-batches since."""
        first, length = self._left(self.origin.taken), self._planned()
        since = done - self.origin.done
        if since < first or not length:
            return self.origin.epoch, self.origin.taken, max(since, 0)
        epochs, start = divmod(since - first, length)
        return self.origin.epoch + 1 + epochs, 0, start

    def _left(self, taken: int) -> int:
        """Micro-batches of an epoch on each rank when so many of its sequences have been taken."""
        slots = self.slots
        return -(-max(min(len(self.sequences), self._planned() * slots) - taken, 0) // slots)

    @property
    def slots(self) -> int:
        """Sequences of one micro-batch on all ranks together."""
        return self.sequences_per_batch * place_of(self.trainer, self.shuffle).world_size

    def position(self) -> dict[str, Any]:
        """Where training stands, for `take_up`."""
        done = place_of(self.trainer, self.shuffle).done
        epoch, taken, start = self._found(done)
        taken = min(taken + start * self.slots, len(self.sequences))
        here = Origin(done, epoch, taken)
        return {"here": list(here), "origin": list(self.origin), "slots": self.slots, "of": len(self.sequences)}

    def take_up(self, position: dict[str, Any]) -> None:
        """Go on from a `position`: as before, or with what is left of the epoch shared out anew."""
        same = position["slots"] == self.slots
        self.origin = Origin(*position["origin" if same else "here"])

    def done_of_epoch(self, position: dict[str, Any], counted: int) -> int:
        """How many micro-batches of an epoch are done, as they are now, at a `position` where so many were counted.

        Whole steps: what is left then ends with the epoch at the latest.
        """
        if position["slots"] == self.slots:
            return counted
        taken, accumulate = position["here"][2], place_of(self.trainer, self.shuffle).accumulate
        if counted and not taken:  # at the very end of an epoch
            return self._planned()
        return (self._planned() - self._left(taken)) // accumulate * accumulate

    def _replayed(self, place: Place, length: int, again: int) -> Iterator[list[MicroBatch]]:
        """To the end of Lightning's epoch, for a module that wants the same rows every `again` micro-batches."""
        if self.origin.done:
            raise ValueError(
                "the checkpoint is of another number of ranks or another data.tokens_per_batch, and a run layer by "
                "layer cannot share its rows out anew: go on as it was."
            )
        plan = functools.lru_cache(maxsize=1)(self.plan)
        for done in range(place.done, (place.done // length + 1) * length):
            epoch, at = divmod(done % again, length)
            yield [plan(epoch, place.rank, place.world_size, place.accumulate)[at]]

    def _planned(self) -> int:
        """Micro-batches of an epoch after `limit_train_batches`, as Lightning counts them."""
        if self.trainer is None or not self.shuffle:
            return len(self)
        limit = self.trainer.limit_train_batches
        return min(len(self), limit) if isinstance(limit, int) else int(len(self) * limit)

    def plan(
        self, epoch: int, rank: int = 0, world_size: int = 1, accumulate: int = 1, taken: int = 0
    ) -> list[MicroBatch]:
        """This rank's micro-batches of one epoch, or of what is left of it after the first `taken` sequences.

        The last step may be smaller, and its last ones empty.
        """
        order = np.arange(len(self.sequences))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        order = order[taken:]
        per_batch, length = self.sequences_per_batch, self._left(taken)
        plans = []
        for first in range(0, length, accumulate):
            last = min(first + accumulate, length)
            step = order[first * world_size * per_batch : last * world_size * per_batch]
            totals = StepTotals(self._targets[step].sum(0), int(self._tokens[step].sum()), -(-len(step) // per_batch))
            for batch in range(first, last):
                begin = (batch * world_size + rank) * per_batch
                chosen = order[begin : begin + per_batch].tolist()
                plans.append(MicroBatch([self.sequences[i] for i in chosen], totals))
        return plans


def place_of(trainer: Trainer | None, training: bool) -> Place:
    """The place of this process, in training or in evaluation."""
    if trainer is None:
        return Place(0, 1, 1, 0)
    if not training:
        return Place(trainer.global_rank, trainer.world_size, 1, 0)
    done: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return Place(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches, done)


def check_trainer(trainer: Trainer | None, streaming: bool = False) -> None:
    """Refuses trainer settings under which rows would be lost or steps would divide by the wrong total."""
    if trainer is None:
        return
    # Lightning's own sampler would take the place of ours and hand out rows by their number.
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError("trainer.use_distributed_sampler is true: set it to false, our sampler shares the rows out.")
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if streaming and isinstance(limit, int) and limit % accumulate:
        raise ValueError(
            f"trainer.limit_train_batches {limit} cuts a streamed optimizer step in two: "
            f"make it a multiple of trainer.accumulate_grad_batches {accumulate}."
        )


class _StepLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that counts as stateful for Lightning, which else warns that a resumed epoch starts over.

    There is nothing to save: the sampler derives its place from the trainer's progress.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def step_loader(rows: PackedRows, sampler: Sampler[list[MicroBatch]], num_workers: int) -> DataLoader[Any]:
    """A DataLoader over planned micro-batches: the main process plans, workers build the tensors."""
    return _StepLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=_only,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=obey_the_parent_alone,
    )


def obey_the_parent_alone(worker: int) -> None:
    """Let signals end no process of a DataLoader but through the one that trains, which is to finish its step and save.

    A terminal's Ctrl-C, SLURM and `kill -- -GROUP` tell every process of a run, and training fails when one that builds
    batches ends.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """SIGTERM is how the parent ends a worker that it waits for in vain."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _only(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A plan is a whole micro-batch already."""
    (batch,) = batches
    return batch
