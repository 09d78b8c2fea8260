"""Rows that are read while training goes on: who reads what, in which order, and where a run goes on.

Shapes: S segments (5); the shapes of a batch stand in packing.py.

The sources fall into *shards* (sources.py). Each epoch deals them out to *lanes*, as many on each rank as it has
workers (at least one); a lane is read by one process, and nobody reads what is not its own. A lane is read in blocks of
`shuffle_buffer` rows, each shuffled: all that memory has to hold. Which shards a lane has, in which order, and the
order within a block are functions of (seed, epoch). A rank takes from its lanes in turn.

Before each optimizer step the ranks tell each other how much they have for it and where their lanes stand: one
`all_gather` of a few hundred bytes a rank, between the CPUs. So every micro-batch carries the exact totals of its step,
and every rank knows the place of all, which is what a checkpoint holds.

An epoch ends when every rank has run out. Shards are dealt out by size, so that this is about the same time for all; a
rank that runs out earlier takes part with empty micro-batches until then. So no row is dropped or repeated, and no rank
waits for another in vain, however unequal the shards are.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from agri_moe.data.packing import (
    SEGMENTS,
    MicroBatch,
    PackedRow,
    PackedRows,
    Place,
    StepSampler,
    StepTotals,
    check_trainer,
    obey_the_parent_alone,
    place_of,
    step_loader,
)
from agri_moe.data.rows import LISTED, Record, Rejected, Rows, too_little_aligned, too_long
from agri_moe.data.sources import RawRow, Shard, Source, find_shards, find_sources, read_shard

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_READ_AHEAD = 128  # rows that a worker has ready
JUDGED = 1000  # rows of an epoch before which a share of them says little

Cursor = dict[str, Any]
"""A place in a stream, as a checkpoint holds it: {"epoch": e} before its first row; later also `shards` (what they were
and how they are dealt out), `ranks` and `accumulate` of the run, `lanes` (a `Spot` each), `last` (of each rank the
lane that it took from last) and `counted` (rows that could not be used, and all rows so far)."""


def row_id(shard: int, row: int, record: int) -> int:
    """The id of a record in batches: number of its shard, of its row in the file, and its own in that row."""
    return (shard << 42) + (row << 14) + record


def origin(row_id: int) -> tuple[int, int]:
    """The shard's number, and that of the row in its file, that `row_id` was made of."""
    return row_id >> 42, (row_id >> 14) & ((1 << 28) - 1)


class Spot(NamedTuple):
    """Where a lane stands: the block in hand begins at row `row` of the lane's shard `shard`.

    `taken` of its rows (in the shuffled order) are done, and `records` of the records of the row after these.
    """

    shard: int = 0
    row: int = 0
    taken: int = 0
    records: int = 0


class StreamedRow(NamedTuple):
    """A row of a stream, its targets, and the tokens of its answer: those aligned with the teacher's view, and all."""

    row: PackedRow
    targets: np.ndarray[Any, Any]  # [2, S]
    aligned: tuple[int, int] = (0, 0)


class Item(NamedTuple):
    """What comes out of a lane (a row, one that cannot be used, or why the run must end), and where that leaves it."""

    what: StreamedRow | Rejected | str
    lane: int
    after: Spot


@dataclass(frozen=True)
class Lane:
    """Shards that one process reads, from a spot on."""

    number: int
    shards: list[tuple[int, Shard]]  # with their number among all
    spot: Spot


@dataclass(frozen=True)
class Reader:
    """Turns a lane into items. It is sent to the workers, so it holds no trainer.

    Args:
        encode: The records of a raw row.
        columns: What is read of a Parquet file.
        max_length: Longest row in tokens.
        seed: Seed of the order.
        shuffle_buffer: Rows of a block.
        min_aligned: Least share of an answer that must align with the teacher's view.
    """

    encode: Callable[[RawRow], list[Record]]
    columns: set[str]
    max_length: int
    seed: int
    shuffle_buffer: int
    min_aligned: float = 0.0

    def deal(self, shards: list[Shard], lanes: int, epoch: int) -> list[list[tuple[int, Shard]]]:
        """Shards of each lane in the order of the epoch: the largest first, each to the lane that has least by then."""
        random = np.random.default_rng((self.seed, epoch)).permutation(len(shards)).tolist()
        dealt: list[list[int]] = [[] for _ in range(lanes)]
        loads = [(0, lane) for lane in range(lanes)]
        for at in sorted(range(len(shards)), key=lambda at: -shards[random[at]].size):
            load, lane = loads[0]
            dealt[lane].append(at)
            heapq.heapreplace(loads, (load + shards[random[at]].size, lane))
        return [[(random[at], shards[random[at]]) for at in sorted(one)] for one in dealt]

    def read(self, lane: Lane, epoch: int) -> Iterator[Item]:
        """The items of a lane from its spot on."""
        spot = lane.spot
        rows = self._rows(lane)
        while block := list(islice(rows, self.shuffle_buffer)):
            begins, (last, raw) = (spot.shard, spot.row), block[-1]
            order = np.random.default_rng((self.seed, epoch, lane.number, *begins)).permutation(len(block)).tolist()
            for taken in range(spot.taken, len(block)):
                at, raw_row = block[order[taken]]
                number, shard = lane.shards[at]
                records = self.encode(raw_row)
                for n in range(spot.records, len(records)):
                    rest = n + 1 < len(records)
                    after = Spot(*begins, taken, n + 1) if rest else Spot(*begins, taken + 1)
                    named = row_id(number, raw_row.number, n)
                    yield Item(self._checked(shard.source, named, raw_row, records[n]), lane.number, after)
                spot = Spot(*begins, taken + 1)
            spot = Spot(last, raw.number + 1)

    def _rows(self, lane: Lane) -> Iterator[tuple[int, RawRow]]:
        for at in range(lane.spot.shard, len(lane.shards)):
            start = lane.spot.row if at == lane.spot.shard else 0
            for raw in read_shard(lane.shards[at][1], start, self.columns):
                yield at, raw

    def _checked(self, source: Source, named: int, raw: RawRow, record: Record) -> StreamedRow | Rejected:
        aligned = (record.get("aligned", 0), record.get("answer", 0))
        reason = record["reason"] or too_long(record["length"], self.max_length)
        reason = reason or too_little_aligned(*aligned, self.min_aligned)
        if reason:
            return Rejected(source.name, raw.number, reason)
        arrays = (np.array(record[name]) for name in PackedRow._fields[1:] if name in record)
        return StreamedRow(PackedRow(named, *arrays), np.array(record["counts"]).reshape(2, SEGMENTS), aligned)


class _Lanes(IterableDataset[Item]):
    """The items of several lanes, one of each in turn; with workers, each has one lane."""

    def __init__(self, reader: Reader, lanes: list[Lane], epoch: int) -> None:
        self.reader = reader
        self.lanes = lanes
        self.epoch = epoch

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        lanes = self.lanes if worker is None else [self.lanes[worker.id]]
        waiting = deque(self._items(lane) for lane in lanes)
        while waiting:
            items = waiting.popleft()
            for item in islice(items, 1):
                yield item
                waiting.append(items)

    def _items(self, lane: Lane) -> Iterator[Item]:
        try:
            yield from self.reader.read(lane, self.epoch)
        except ValueError as error:  # raised where the user sees it: torch would wrap it in a worker's traceback
            yield Item(str(error), lane.number, lane.spot)


class Share:
    """A rank's share of an epoch from a cursor on, and where its lanes stand.

    Args:
        items: What its lanes yield.
        lanes: Number of a lane -> where it stands.
        last: The lane that was taken from last; -1 is none.

    Attributes:
        rejected: Rows that cannot be used, since somebody last emptied it; the first of them by name.
        counted: How many rows cannot be used, and how many there were, since somebody last took the counts back to 0.
    """

    def __init__(self, items: Iterator[Item], lanes: Mapping[int, Spot], last: int) -> None:
        self.lanes = dict(lanes)
        self.last = last
        self.rejected: list[Rejected] = []
        self.counted = (0, 0)
        self._items = items
        self._next: tuple[Item, StreamedRow] | None = None

    def peek(self) -> StreamedRow | None:
        """The next usable row, which stays the next; None at the end."""
        while self._next is None:
            item = next(self._items, None)
            if item is None:
                return None
            if isinstance(item.what, str):
                raise ValueError(item.what)
            if isinstance(item.what, Rejected):
                self._pass(item)
                if len(self.rejected) < LISTED:
                    self.rejected.append(item.what)
            else:
                self._next = item, item.what
        return self._next[1]

    def take(self) -> StreamedRow:
        """The next usable row, which is done with."""
        assert self._next is not None, "peek has found it"
        (item, row), self._next = self._next, None
        self._pass(item)
        return row

    def _pass(self, item: Item) -> None:
        self.lanes[item.lane] = item.after
        self.last = item.lane
        skipped, rows = self.counted
        self.counted = skipped + isinstance(item.what, Rejected), rows + 1


@dataclass
class RowStream:
    """The rows of some sources, shared out among ranks and their workers.

    Args:
        sources: What to read.
        reader: How.
        num_workers: Processes of a rank that read and tokenise; with 0 its main process does.
        reject: Told of each row that cannot be used; raises ValueError to stop the run.
        max_skipped_share: When a larger share of an epoch's rows cannot be used, the run stops. Before the epoch ends,
            it is judged as if it had had 1,000 rows at least.

    Raises:
        ValueError: If the sources hold no rows, or a footer cannot be read.
    """

    sources: list[Source]
    reader: Reader
    num_workers: int
    reject: Callable[[Rejected], None]
    max_skipped_share: float = 1.0
    shards: list[Shard] = field(init=False)

    def __post_init__(self) -> None:
        self.shards = find_shards(self.sources)
        if not self.shards:
            raise ValueError("data.train names files without a row: name some that have rows.")

    @cached_property
    def mark(self) -> str:
        """SHA-256 of what the meaning of a cursor hangs on."""
        known = (self.shards, self.reader.seed, self.reader.shuffle_buffer)
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def check_skipped(self, skipped: int, rows: int, ended: bool) -> None:
        """Refuses to go on where too large a share of the rows, of an epoch or so far, cannot be used."""
        if skipped > self.max_skipped_share * (rows if ended else max(rows, JUDGED)):
            raise ValueError(
                f"data.train: {skipped} of {rows} rows cannot be used, more than data.max_skipped_share "
                f"{self.max_skipped_share:g} allows; the warnings before this name them."
            )

    def check(self, ranks: int) -> None:
        """Refuses sources of which some rank would have no part."""
        if len(self.shards) < ranks:
            raise ValueError(
                f"data.train has {len(self.shards)} shards (row groups of Parquet files, other files whole) for "
                f"{ranks} ranks, which read at least one each: write smaller row groups, or more files."
            )

    def check_cursor(self, cursor: Cursor, ranks: int, accumulate: int, within_step: bool) -> None:
        """Refuses a checkpoint's place that cannot be gone on from exactly.

        Another number of ranks is no hindrance as long as each has a lane: these stay as they were dealt out until the
        epoch ends.
        """
        if set(cursor) == {"epoch"}:
            return
        if cursor.get("shards") != self.mark:
            raise ValueError(
                "the checkpoint stands within an epoch of other shards: data.train, data.seed and data.shuffle_buffer "
                "must be as they were, or start afresh with --resume never."
            )
        if ranks > len(cursor["lanes"]):
            raise ValueError(
                f"the checkpoint stands within an epoch that {cursor['ranks']} ranks have shared out in "
                f"{len(cursor['lanes'])} parts, too few for {ranks} ranks: go on with {len(cursor['lanes'])} at most."
            )
        if within_step and (ranks, accumulate) != (cursor["ranks"], cursor["accumulate"]):
            raise ValueError(
                f"the checkpoint stands within an optimizer step of {cursor['ranks']} ranks with trainer."
                f"accumulate_grad_batches {cursor['accumulate']}: go on with these, or from another checkpoint."
            )

    def open(self, cursor: Cursor, rank: int, ranks: int) -> Share:
        """A rank's share of an epoch from a cursor on."""
        self.check(ranks)
        # Idle workers do no harm, but a lane without a shard would take another's.
        each = max(1, min(self.num_workers, len(self.shards) // ranks))
        spots = [Spot(*spot) for spot in cursor["lanes"]] if "lanes" in cursor else [Spot()] * (ranks * each)
        dealt = self.reader.deal(self.shards, len(spots), cursor["epoch"])
        own = range(rank, len(spots), ranks)
        last = cursor["last"][rank] if cursor.get("ranks") == ranks else -1
        after = own.index(last) + 1 if last in own else 0
        lanes = [Lane(i, dealt[i], spots[i]) for i in [*own[after:], *own[:after]]]
        loader: DataLoader[Item] = DataLoader(
            _Lanes(self.reader, lanes, cursor["epoch"]),
            batch_size=None,
            num_workers=len(lanes) if self.num_workers else 0,
            prefetch_factor=_READ_AHEAD if self.num_workers else None,
            collate_fn=_as_is,
            worker_init_fn=obey_the_parent_alone,
        )
        return Share(iter(loader), {i: spots[i] for i in own}, last)


def _as_is(item: Any) -> Any:
    return item


class Offer(NamedTuple):
    """What a rank has for the next step, the rows left out on the way, and where its lanes stand before all that.

    `counted` is of the rows on the way, those taken included: how many cannot be used, and how many there were. `error`
    ends the run, on all ranks.
    """

    sequences: int
    targets: np.ndarray[Any, Any]  # [2, S]
    tokens: int
    lanes: dict[int, Spot]
    last: int
    rejected: list[Rejected]
    counted: tuple[int, int]
    error: str


class Agreement:
    """Every rank's offer, on every rank: one collective between the CPUs, apart from those of the gradients."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def __call__(self, offer: Offer, ranks: int) -> list[Offer]:
        """The offers of all ranks, in their order; every rank must call it."""
        if ranks == 1:
            return [offer]
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        offers: list[Any] = [None] * ranks
        dist.all_gather_object(offers, offer, group=self._group)
        return offers


@dataclass
class StreamSampler(Sampler[list[MicroBatch]]):
    """Plans steps over a stream of unknown length, one step ahead, so that their totals are known.

    A checkpoint needs only the cursor of the step it stands in and how many micro-batches were done when that began:
    what had been read ahead is read again.

    Args:
        stream: The rows.
        max_length: Longest sequence.
        sequences_per_batch: Sequences in one micro-batch.
        trainer: Where ranks, accumulation and progress are read from.
        starts: Micro-batches done when a step began, and the cursor of that step; the newest last.
        agree: How the ranks' offers come together.
        aligned: [2] tokens of the answers taken so far: those aligned with the teacher's view, and all.
    """

    stream: RowStream
    max_length: int
    sequences_per_batch: int
    trainer: Trainer | None = None
    starts: list[tuple[int, Cursor]] = field(default_factory=lambda: [(0, {"epoch": 0})])
    agree: Callable[[Offer, int], list[Offer]] = field(default_factory=Agreement)
    aligned: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(2, np.int64))

    def position(self) -> tuple[int, Cursor]:
        """The step that training stands in: micro-batches done when it began, and its cursor."""
        done = place_of(self.trainer, True).done
        fresh = (done, {"epoch": 0})  # another trainer than the one whose places were noted
        return next((start for start in reversed(self.starts) if start[0] <= done), fresh)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        place = place_of(self.trainer, True)
        began, cursor = self.position()
        self.stream.check_cursor(cursor, place.world_size, place.accumulate, place.done > began)
        self.starts = [(began, cursor)]
        return self._steps(place, began, cursor)

    def _steps(self, place: Place, began: int, cursor: Cursor) -> Iterator[list[MicroBatch]]:
        skip = place.done - began
        # A checkpoint at the very end of an epoch finds nothing left of it: the next one follows at once.
        for start in (cursor, {"epoch": cursor["epoch"] + 1}):
            yielded = False
            for first, plans in self._plan(start, place):
                self._remember(began, first)
                for plan in plans[skip:]:
                    yielded = True
                    yield [plan]
                began, skip = began + len(plans), max(skip - len(plans), 0)
            self._remember(began, {"epoch": start["epoch"] + 1})
            if yielded:
                return
        raise ValueError("data.train: none of its rows can be used.")  # else Lightning would ask for ever

    def _remember(self, began: int, cursor: Cursor) -> None:
        """Notes where a step begins, and forgets those that training has left behind."""
        if self.starts[-1] != (began, cursor):
            self.starts.append((began, cursor))
        done = place_of(self.trainer, True).done
        while len(self.starts) > 1 and self.starts[1][0] <= done:
            self.starts.pop(0)

    def _plan(self, cursor: Cursor, place: Place) -> Iterator[tuple[Cursor, list[MicroBatch]]]:
        """Steps of an epoch from a cursor, each with its own cursor, until no rank has anything left."""
        share = self.stream.open(cursor, place.rank, place.world_size)
        counted = np.array(cursor.get("counted", (0, 0)))
        while True:
            bins, offer = self._fill(share, self.sequences_per_batch * place.accumulate)
            offers = self.agree(offer, place.world_size)
            for told in offers:
                for row in told.rejected:  # every rank hears of them all: the first is the one that warns
                    self.stream.reject(row)
                if told.error:
                    raise ValueError(told.error)
            begins_at, counted = counted, counted + np.sum([told.counted for told in offers], axis=0)
            rounds = -(-max(told.sequences for told in offers) // self.sequences_per_batch)
            self.stream.check_skipped(int(counted[0]), int(counted[1]), ended=not rounds)
            if not rounds:
                return
            totals = StepTotals(
                np.sum([told.targets for told in offers], axis=0),
                sum(told.tokens for told in offers),
                sum(-(-told.sequences // self.sequences_per_batch) for told in offers),
            )
            begins = range(0, rounds * self.sequences_per_batch, self.sequences_per_batch)
            plans = [MicroBatch(bins[begin : begin + self.sequences_per_batch], totals) for begin in begins]
            yield self._cursor(cursor["epoch"], place, offers) | {"counted": begins_at.tolist()}, plans

    def _fill(self, share: Share, slots: int) -> tuple[list[list[PackedRow]], Offer]:
        """This rank's sequences of the next step: first-fit until a row fits nowhere; it begins the step after."""
        before, last = dict(share.lanes), share.last
        bins: list[list[PackedRow]] = []
        rooms: list[int] = []
        targets, tokens, error = np.zeros((2, SEGMENTS), np.int64), 0, ""
        try:
            while (streamed := share.peek()) is not None:
                size = len(streamed.row.input_ids)
                chosen = next((i for i, room in enumerate(rooms) if room >= size), len(bins))
                if chosen == slots:
                    break
                if chosen == len(bins):
                    bins.append([])
                    rooms.append(self.max_length)
                row, counts, aligned = share.take()
                bins[chosen].append(row)
                rooms[chosen] -= size
                targets, tokens = targets + counts, tokens + size
                self.aligned += aligned
        except ValueError as refused:  # raised once every rank knows, or the others would wait for this one
            error = str(refused)
        rejected, share.rejected = share.rejected, []
        counted, share.counted = share.counted, (0, 0)
        return bins, Offer(len(bins), targets, tokens, before, last, rejected, counted, error)

    def _cursor(self, epoch: int, place: Place, offers: list[Offer]) -> Cursor:
        spots = {lane: spot for told in offers for lane, spot in told.lanes.items()}
        return {
            "epoch": epoch,
            "shards": self.stream.mark,
            "ranks": place.world_size,
            "accumulate": place.accumulate,
            "lanes": [list(spots[lane]) for lane in range(len(spots))],
            "last": [told.last for told in offers],
        }


class StreamingDataModule(LightningDataModule, ABC):
    """A data module that can stream its training rows, and keeps the place in checkpoints."""

    train: str | list[str] | None

    @abstractmethod
    def rows(self, split: Any) -> Rows:
        """The usable rows of a split that is not streamed."""

    def __init__(self) -> None:
        super().__init__()
        self._stream: StreamSampler | None = None
        self._stream_start: tuple[int, Cursor] | None = None
        self._sampler: StepSampler | None = None
        self._position: tuple[Any, dict[str, Any]] | None = None  # of which trainer, and where it stood

    def stream_loader(self, stream: RowStream, rows: PackedRows, sequences_per_batch: int) -> DataLoader[Any]:
        """Micro-batches of a stream, from where training stands."""
        check_trainer(self.trainer, streaming=True)
        if self._stream is None or self._stream.trainer is not self.trainer:  # it knows where training stands
            self._stream = StreamSampler(stream, rows.max_length, sequences_per_batch, self.trainer)
            if self._stream_start is not None:
                self._stream.starts = [self._stream_start]
        return step_loader(rows, self._stream, num_workers=0)  # the stream has workers of its own

    def origins(self, row_ids: Sequence[int]) -> str:
        """Files and rows of training rows by their ids in batches, each once; a text's pieces are of one row."""
        if self._stream is not None:
            shards = self._stream.stream.shards
            places = [(shards[shard].source.name, row) for shard, row in map(origin, row_ids)]
        else:
            sources = find_sources(self.train, "data.train")
            found = self.rows("train").table.select_columns(["file", "row"])[list(row_ids)]
            places = [(sources[file].name, row) for file, row in zip(found["file"], found["row"], strict=True)]
        by_file: dict[str, list[str]] = {}
        for file, row in dict.fromkeys(places):
            by_file.setdefault(file, []).append(str(row))
        return "; ".join(f"{file} rows {', '.join(rows)}" for file, rows in by_file.items())

    def taken_up(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader of rows that are no stream, from where training stands."""
        assert isinstance(loader.batch_sampler, StepSampler), "as `step_loader` makes it"
        self._sampler = loader.batch_sampler
        if self._position is not None and self._position[0] is self.trainer:
            self._sampler.take_up(self._position[1])
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands: of a stream, in its shards, and else in its sequences."""
        if self._stream is not None:
            done, cursor = self._stream.position()
            return {"done": done, "cursor": dict(cursor)}
        return {"position": self._sampler.position()} if self._sampler is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` saved."""
        if "cursor" in state_dict:
            self._stream_start = (state_dict["done"], state_dict["cursor"])
        if "position" in state_dict:
            self._position = (self.trainer, state_dict["position"])
