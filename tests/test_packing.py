"""Packing, the totals of a step, the order of an epoch, and a run that stops and goes on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from agri_moe.data.chat import Segment
from agri_moe.data.packing import (
    SEGMENTS,
    PackedRow,
    PackedRows,
    StepSampler,
    StepTotals,
    check_trainer,
    collate,
    count_targets,
    pack,
    step_loader,
)
from agri_moe.data.rows import Record, Rejected, bad_row, record
from agri_moe.data.sources import RawRow, Source
from agri_moe.data.streaming import Reader, RowStream, StreamSampler

CONTROL = frozenset({1, 2})
NO_TOTALS = StepTotals(np.zeros((2, SEGMENTS), np.int64), 0, 0)


def made_row(row_id: int, length: int) -> PackedRow:
    """A row whose ids and segments are a function of its number."""
    random = np.random.default_rng(row_id)
    segments = np.sort(random.integers(1, SEGMENTS, length))
    return PackedRow(row_id, random.integers(1, 50, length), segments)


def made_rows(count: int, longest: int = 30, seed: int = 0) -> list[PackedRow]:
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    return [made_row(i, int(length)) for i, length in enumerate(lengths)]


def sampler_of(rows: list[PackedRow], max_length: int, trainer: Any = None, **options: Any) -> StepSampler:
    lengths = np.array([len(row.input_ids) for row in rows])
    counts = np.array([count_targets(row.input_ids, row.segment_ids, CONTROL) for row in rows])
    return StepSampler(pack(lengths, max_length), lengths, counts, trainer=trainer, **options)


def table_of(rows: list[PackedRow]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "segment_ids": [row.segment_ids for row in rows]}
    )


def fake_trainer(done: int = 0, rank: int = 0, world_size: int = 1, accumulate: int = 1, limit: Any = 1.0) -> Any:
    progress = SimpleNamespace(total=SimpleNamespace(processed=done))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
        overfit_batches=0.0,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(0, 3))
def test_pack_keeps_every_row_once_and_fits(lengths: list[int], seed: int) -> None:
    sequences = pack(lengths, 64, seed)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in rows) for rows in sequences]
    assert all(0 < size <= 64 for size in sizes)
    assert sum(size <= 32 for size in sizes) <= 1  # two half-empty sequences would have been one
    assert sequences == pack(lengths, 64, seed)


def test_pack_is_tight_seeded_and_quick() -> None:
    import time

    lengths = np.random.default_rng(0).integers(20, 600, 50_000)
    begin = time.perf_counter()
    sequences = pack(lengths, 2048)
    assert time.perf_counter() - begin < 5  # 0.2 s when it was written; quadratic packing takes minutes
    assert lengths.sum() / (len(sequences) * 2048) > 0.99
    assert len(pack(lengths, 2048, seed=1)) == len(sequences)
    assert pack(lengths, 2048, seed=1) != sequences
    with pytest.raises(ValueError, match="do not fit max_length"):
        pack([3, 9], 8)


def test_a_packed_batch_position_by_position() -> None:
    a = PackedRow(7, np.array([1, 11, 12]), np.array([1, 2, 4]))
    b = PackedRow(3, np.array([1, 21]), np.array([1, 4]))
    c = PackedRow(5, np.array([1, 31, 32, 33]), np.array([2, 2, 3, 4]))
    batch = collate([[a, b], [c]], StepTotals(np.arange(10).reshape(2, 5), 9, 1), max_length=64, pad_id=0)
    expected = {
        "input_ids": [[1, 11, 12, 1, 21, 0, 0, 0], [1, 31, 32, 33, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]],
        "segment_ids": [[1, 2, 4, 1, 4, 0, 0, 0], [2, 2, 3, 4, 0, 0, 0, 0]],
        "row_ids": [[7, 7, 7, 3, 3, -1, -1, -1], [5, 5, 5, 5, -1, -1, -1, -1]],
        "target_ids": [[11, 12, 0, 21, 0, 0, 0, 0], [31, 32, 33, 0, 0, 0, 0, 0]],
        "target_segments": [[2, 4, 0, 4, 0, 0, 0, 0], [2, 3, 4, 0, 0, 0, 0, 0]],
        "step_targets": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]],
    }
    assert {name: batch[name].tolist() for name in expected} == expected
    assert (batch["step_tokens"].item(), batch["step_batches"].item()) == (9, 1)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("length", "max_length", "width"), [(5, 64, 8), (8, 64, 8), (9, 64, 16), (59, 60, 60)])
def test_width_is_a_multiple_of_eight_within_max_length(length: int, max_length: int, width: int) -> None:
    batch = collate([[made_row(0, length)]], NO_TOTALS, max_length, pad_id=0)
    assert batch["input_ids"].shape == (1, width)


def test_an_empty_micro_batch_is_eight_pad_tokens() -> None:
    batch = collate([], NO_TOTALS, 64, pad_id=9)
    assert batch["input_ids"].tolist() == [[9] * 8]
    assert not batch["segment_ids"].any()
    assert not batch["position_ids"].any()
    assert (batch["row_ids"] == -1).all()


def check_epoch(ranks: list[list[dict[str, torch.Tensor]]], rows: list[PackedRow], accumulate: int) -> list[int]:
    """Each row once over all ranks, each step's totals those of its micro-batches; returns the order of rows."""
    assert len({len(batches) for batches in ranks}) == 1
    seen: list[int] = []
    for first in range(0, len(ranks[0]), accumulate):
        step = [batch for batches in ranks for batch in batches[first : first + accumulate]]
        real = [batch for batch in step if (batch["row_ids"] >= 0).any()]
        for batch in step:
            seen += dict.fromkeys(batch["row_ids"][batch["row_ids"] >= 0].tolist())
            assert batch["step_batches"].item() == len(real)
            assert batch["step_tokens"].item() == sum(int((b["row_ids"] >= 0).sum()) for b in real)
            for segment in range(SEGMENTS):
                targets = [b["target_ids"][(b["target_segments"] == segment) & (b["row_ids"] >= 0)] for b in step]
                ids = torch.cat(targets) if segment else torch.zeros(0, dtype=torch.int64)
                assert batch["step_targets"][0, segment] == len(ids)
                assert batch["step_targets"][1, segment] == sum(i in CONTROL for i in ids.tolist())
    assert Counter(seen) == Counter(range(len(rows)))
    return seen


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_row_lost_or_doubled_and_totals_are_right(world_size: int, accumulate: int) -> None:
    rows = made_rows(97)
    dataset = PackedRows(table_of(rows), 64, 0)
    length = -(-len(pack([len(row.input_ids) for row in rows], 64)) // (3 * world_size))
    orders = []
    for epoch in range(2):
        ranks = []
        for rank in range(world_size):
            trainer = fake_trainer(epoch * length, rank, world_size, accumulate)
            loader = step_loader(dataset, sampler_of(rows, 64, trainer, sequences_per_batch=3), 0)
            ranks.append(list(loader))
            assert len(loader) == len(ranks[-1]) == length
        orders.append(check_epoch(ranks, rows, accumulate))
    assert orders[0] != orders[1]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    rows = made_rows(60)
    sampler = sampler_of(rows, 64, sequences_per_batch=2, seed=3)
    order = [plan.sequences for plan in sampler.plan(1)]
    assert order == [plan.sequences for plan in sampler_of(rows, 64, sequences_per_batch=2, seed=3).plan(1)]
    assert order != [plan.sequences for plan in sampler_of(rows, 64, sequences_per_batch=2, seed=4).plan(1)]
    assert len(order) == len(sampler.plan(0)) == len(sampler)
    fixed = sampler_of(rows, 64, sequences_per_batch=2, shuffle=False)
    assert [p.sequences for p in fixed.plan(0)] == [p.sequences for p in fixed.plan(5)]


def test_a_limited_epoch_plans_steps_that_end_with_it() -> None:
    rows = made_rows(97)
    trainer = fake_trainer(accumulate=2, limit=3)
    batches = list(
        step_loader(PackedRows(table_of(rows), 64, 0), sampler_of(rows, 64, trainer, sequences_per_batch=2), 0)
    )
    assert len(batches) == 3
    assert batches[2]["step_tokens"] == (batches[2]["row_ids"] >= 0).sum()  # the last step is one micro-batch
    later = sampler_of(rows, 64, fake_trainer(done=4, accumulate=2, limit=3), sequences_per_batch=2)
    assert [p.sequences for (p,) in later] == [p.sequences for p in later.plan(1, accumulate=2)[1:]]


def records_of(rows: list[PackedRow], raw: RawRow) -> list[Record]:
    """What a data module's encoding gives: here, the made row with the number in the file."""
    row = rows[raw.values["number"]]
    return [record(row.input_ids.tolist(), row.segment_ids.tolist(), CONTROL, "")]


def write_numbers(path: Path, numbers: range, group: int = 7) -> Source:
    """A file of row numbers, in row groups of so many."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"number": list(numbers)}), path, row_group_size=group)
    else:
        path.write_text("".join(f'{{"number": {number}}}\n' for number in numbers))
    return Source(str(path), path.suffix[1:])


def no_bad_rows(row: Rejected) -> None:
    raise bad_row(row)


def stream_of(
    sources: list[Source], rows: list[PackedRow], trainer: Any, num_workers: int = 0, buffer: int = 10, **options: Any
) -> StreamSampler:
    reader = Reader(functools.partial(records_of, rows), {"number"}, 64, seed=5, shuffle_buffer=buffer)
    return StreamSampler(RowStream(sources, reader, num_workers, no_bad_rows), 64, 2, trainer, **options)


def test_trainer_settings_that_would_spoil_totals_are_refused() -> None:
    trainer = fake_trainer(accumulate=2, limit=3)
    trainer._accelerator_connector = SimpleNamespace(use_distributed_sampler=True)
    check_trainer(trainer)
    with pytest.raises(ValueError, match="limit_train_batches 3 cuts"):
        check_trainer(trainer, streaming=True)
    trainer.world_size = 2
    with pytest.raises(ValueError, match="use_distributed_sampler is true"):
        check_trainer(trainer)


class Recorder(LightningModule):
    """Notes the rows of each batch it trains on; its weight is the sum of their ids, so a lost step would show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        ids = batch["row_ids"]
        ids = torch.where(ids < 1000, ids, (ids >> 14) % 2**28)  # of a streamed row, its number in the file
        self.seen.append((self.current_epoch, list(dict.fromkeys(ids[ids >= 0].tolist()))))
        return self.weight * ids.clamp(min=0).float().sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        assert "row_ids" in batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Data(LightningDataModule):
    """Made rows, planned or streamed."""

    def __init__(self, folder: Path, streaming: bool, num_workers: int) -> None:
        super().__init__()
        self.folder = folder
        self.streaming = streaming
        self.num_workers = num_workers
        self.made = made_rows(60)
        self.starts: Any = [(0, {"epoch": 0})]

    def train_dataloader(self) -> Any:
        if not self.streaming:
            sampler = sampler_of(self.made, 64, self.trainer, sequences_per_batch=1, seed=5)
            return step_loader(PackedRows(table_of(self.made), 64, 0), sampler, self.num_workers)
        source = write_numbers(self.folder / "numbers.parquet", range(60))
        self.stream = stream_of([source], self.made, self.trainer, self.num_workers, starts=self.starts)
        return step_loader(PackedRows(None, 64, 0), self.stream, 0)

    def val_dataloader(self) -> Any:
        sampler = sampler_of(self.made, 64, self.trainer, sequences_per_batch=4, shuffle=False)
        return step_loader(PackedRows(table_of(self.made), 64, 0), sampler, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.stream.position()} if self.streaming else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.starts = [tuple(state_dict["start"])]


class SaveAt(Callback):
    """Saves a checkpoint at one micro-batch: when it ends, or at the end of the validation that follows."""

    def __init__(self, batch: int, path: Path, hook: str) -> None:
        self.batch = batch
        self.path = path
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if done == self.batch and not self.path.exists() and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def fit(
    folder: Path, data: Data, callback: Callback | None = None, ckpt: Path | None = None, **options: Any
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        callbacks=[callback] if callback else None,
        default_root_dir=folder,
        **{"val_check_interval": 4, "num_sanity_val_steps": 0}
        | options
        | dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Recorder]:
    @functools.cache
    def run(streaming: bool, num_workers: int) -> Recorder:
        folder = tmp_path_factory.mktemp("whole")
        return fit(folder, Data(folder, streaming, num_workers))

    return run


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_of_a_run_has_each_row_once(whole_runs: Callable[[bool, int], Recorder], streaming: bool) -> None:
    seen = whole_runs(streaming, 0).seen
    epochs = [[row for at, rows in seen if at == epoch for row in rows] for epoch in range(3)]
    assert all(sorted(rows) == list(range(60)) for rows in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("place", "hook", "num_workers"),
    [
        ("middle", "on_train_batch_end", 0),
        ("middle", "on_train_batch_end", 2),
        ("middle", "on_validation_end", 0),
        ("within a step", "on_train_batch_end", 2),
        ("second epoch", "on_train_batch_end", 0),
        ("end", "on_train_batch_end", 0),
        ("end", "on_validation_end", 0),
    ],
)
def test_a_resumed_run_sees_what_a_whole_run_sees(
    tmp_path: Path,
    whole_runs: Callable[[bool, int], Recorder],
    streaming: bool,
    place: str,
    hook: str,
    num_workers: int,
) -> None:
    whole = whole_runs(streaming, num_workers if streaming else 0)  # a stream's order follows the number of workers
    length = sum(epoch == 0 for epoch, _ in whole.seen)
    batch = {"middle": 4, "within a step": 5, "second epoch": length + 6, "end": length}[place]
    at_end = {"val_check_interval": 1.0} if place == "end" else {}  # validation at the end, where it is saved
    callback = SaveAt(batch, tmp_path / "a.ckpt", hook)
    first = fit(tmp_path, Data(tmp_path, streaming, num_workers), callback, **at_end)
    assert first.seen == whole.seen
    resumed = fit(tmp_path, Data(tmp_path, streaming, num_workers), ckpt=tmp_path / "a.ckpt", **at_end)
    assert resumed.seen == whole.seen[batch:]
    # Within a step Lightning loses the gradients gathered so far, whatever the loader does.
    assert place == "within a step" or resumed.weight.equal(whole.weight)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (3, 2), (1, 4), (4, 4)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_another_number_of_ranks_each_row_is_seen_once(ranks: tuple[int, int], accumulate: int) -> None:
    made = made_rows(60)

    def planned(world: int, done: int, position: Any = None) -> tuple[StepSampler, list[list[Any]]]:
        samplers = []
        for rank in range(world):
            trainer = fake_trainer(done, rank, world, accumulate)
            samplers.append(sampler_of(made, 64, trainer, sequences_per_batch=1, seed=5))
            if position is not None:
                samplers[-1].take_up(position)
        return samplers[0], [[plan for (plan,) in sampler] for sampler in samplers]

    def rows(plans: list[list[Any]]) -> list[int]:
        return [row for rank in plans for plan in rank for sequence in plan.sequences for row in sequence]

    before, after = ranks
    length = len(planned(before, 0)[0])
    for steps in range(1, 2 * length // accumulate):
        done = steps * accumulate
        saved, _ = planned(before, done)
        position = saved.position()
        epoch = done // length
        seen = rows([plans[: done - epoch * length] for plans in planned(before, epoch * length)[1]])
        first, left = planned(after, done, position)
        assert sorted(seen + rows(left)) == list(range(60)), (steps, "each row of the epoch once")
        assert first.done_of_epoch(position, done - epoch * length) + len(left[0]) <= len(first)
        totals = [plan.totals for plan in left[0]]
        assert sum(t.tokens for t in totals[::accumulate]) == sum(len(made[row].input_ids) for row in rows(left))
        # And the next epoch is whole, also where it is interrupted again.
        later = done + len(left[0])
        _, whole = planned(after, later, position)
        assert sorted(rows(whole)) == list(range(60))
        again = first
        again.trainer = fake_trainer(later + accumulate, 0, after, accumulate)
        _, rest = planned(after, later + accumulate, again.position())
        seen = rows([plans[:accumulate] for plans in whole])
        assert sorted(seen + rows(rest)) == list(range(60))


def test_overfit_batches_repeats_the_same_batches(tmp_path: Path) -> None:
    seen = fit(tmp_path, Data(tmp_path, False, 0), overfit_batches=2, val_check_interval=1.0).seen
    assert len(seen) == 6
    assert [rows for _, rows in seen[:2]] == [rows for _, rows in seen[2:4]] == [rows for _, rows in seen[4:]]


def test_segments_are_counted_by_target() -> None:
    ids, segments = (
        [1, 11, 2, 12, 2],
        [Segment.SYSTEM, Segment.USER, Segment.USER, Segment.THOUGHT, Segment.ASSISTANT],
    )
    assert count_targets(ids, segments, CONTROL).tolist() == [[0, 0, 2, 1, 1], [0, 0, 1, 0, 1]]
    assert count_targets([1], [1], CONTROL).sum() == 0
