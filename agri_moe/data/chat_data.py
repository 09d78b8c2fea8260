"""ChatDataModule: chat rows from files or the hub, tokenised once, packed, in a seeded order that resumes.

Shapes: S segments (5); the shapes of a batch stand in packing.py.

How rows flow: sources -> tokens (cached on disk) -> split by the scenario's hash -> packed sequences ->
StepSampler plans whole optimizer steps -> collate. A row that cannot be used stops the run or is listed in
`rejected`; it never disappears. Streamed rows take another way (streaming.py).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from agri_moe.data.chat import DEFAULT_FORMAT, Chat, ChatFormat, render_scenario, usable_text
from agri_moe.data.groups import Groups, check_group_by, grouped
from agri_moe.data.packing import PackedRows, check_trainer
from agri_moe.data.rows import (
    BadRows,
    Loaded,
    Record,
    Rejected,
    Rows,
    apply_policy,
    bad_record,
    check_held_out,
    check_numbers,
    hold_out,
    load,
    packed_loader,
    record,
    skip_streamed,
)
from agri_moe.data.sources import RawRow, Source, check_columns, find_sources, of_each
from agri_moe.data.streaming import Reader, RowStream, StreamingDataModule
from agri_moe.data.teacher_view import TeacherView

REQUIRED = ("scenario", "advisory")
COLUMNS = ("system", "scenario", "thought", "advisory")
TRUTH = ("diagnosis", "action")  # what an answer to the row must say, where the row tells

Split = Literal["train", "validation", "test"]


class ChatDataModule(StreamingDataModule):
    """Chat rows for training: sources, splits, packing, order.

    Args:
        tokenizer: Folder or hub name of the tokenizer.
        train: A file (Parquet, JSONL, CSV), folder or glob, here or behind a URL that fsspec opens (s3://, gs://,
            hf://, ...); a hub dataset (NAME or NAME:SPLIT); or a list of these.
        validation: The same; without it, `validation_share` of the training rows is held out by scenario.
        test: The same; the validation rows by default.
        columns: Our column -> the one in the files, e.g. {advisory: answer}.
        format: Markers, scenario header and default instruction.
        max_length: Longest packed sequence, in tokens; a longer row is a bad row.
        tokens_per_batch: Tokens of one micro-batch on each rank; `test` and `predict` have as many rows answered at a
            time as fit if each is `max_length` long.
        validation_share: Share of the scenarios held out when `validation` is not given.
        bad_rows: `error` stops at a row that cannot be used; `skip` leaves such rows out, counted and listed.
        max_skipped_share: With `skip`, the run stops when a larger share of the rows than this is bad.
        seed: Seed of packing and order.
        num_workers: Processes of each rank that build batches; of streamed rows, that read and tokenise.
        num_proc: Processes that tokenise; whole files are shared out among them.
        streaming: Reads and tokenises on the fly, each rank its own row groups and files: for data that fits no disk.
        shuffle_buffer: Streamed rows that each worker holds and shuffles at a time; 1 keeps them in the files' order.
        cache_dir: Folder of the tokenised rows; Hugging Face's own by default.
        group_by: Column, or struct.field such as scenario.crop, by which validation and test sort their rows into
            groups, at most 64: they then tell the loss of each, and which experts serve it. A row without is a bad row.

    Attributes:
        teacher_view: How the teacher reads the rows, if not as the student does; by default what the module in
            training has under the same name.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        columns: dict[str, str] | None = None,
        format: ChatFormat = DEFAULT_FORMAT,
        max_length: int = 2048,
        tokens_per_batch: int = 16384,
        validation_share: float = 0.05,
        bad_rows: BadRows = "error",
        max_skipped_share: float = 1.0,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int = 1,
        streaming: bool = False,
        shuffle_buffer: int = 4096,
        cache_dir: str | None = None,
        group_by: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.train, self.validation, self.test = train, validation, test
        self.columns = dict(columns or {})
        self.format = format
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.validation_share = validation_share
        self.bad_rows = bad_rows
        self.max_skipped_share = max_skipped_share
        self.seed = seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.cache_dir = cache_dir
        self.group_by = group_by
        self.rejected: list[Rejected] = []
        self.teacher_view: TeacherView | None = None
        self._rows: dict[str, Rows] = {}
        self._rows_view: TeacherView | None = None  # the one that _rows were loaded for
        self._row_stream: RowStream | None = None
        check_numbers(self, "max_length")

    @functools.cached_property
    def chat(self) -> Chat:
        """The tokenizer with its markers, loaded when first asked for."""
        return Chat.load(self.tokenizer, self.format)

    def check(self) -> None:
        """Raises a ValueError on wrong files, columns or tokenizer, before anything heavy is loaded."""
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"data.columns names {unknown[0]}, which is no column of ours: {', '.join(COLUMNS)}.")
        for split in ("train", "validation", "test"):
            if getattr(self, split) is not None:
                wanted = {**dict(zip(REQUIRED, REQUIRED, strict=True)), **self.columns}
                of_each(self._sources(split), functools.partial(check_columns, wanted=wanted))
        check_held_out(self)
        check_group_by(self)
        _ = self.chat

    def prepare_data(self) -> None:
        """Fills the cache of tokenised rows once per node; the other ranks find it there in `setup`."""
        self.setup(self.trainer.state.fn if self.trainer is not None else None)

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that a stage (fit, validate, test or predict) needs."""
        if not self._rows:
            self.check()
        if stage in (None, "fit"):
            if self.streaming:
                self._rows_to_stream().check(self.trainer.world_size if self.trainer is not None else 1)
            else:
                self.rows("train")
            self.rows("validation")
            self._warn_of_shared_scenarios()
        elif stage == "validate":
            self.rows("validation")
        else:
            self.rows("test")
        self.groups("test" if stage in ("test", "predict") else "validation")

    def _warn_of_shared_scenarios(self) -> None:
        """Says of how many validation rows the scenario is trained on; of a stream, that cannot be known."""
        if "train" not in self._rows or not len(self._rows["validation"]):
            return
        held_out = self._rows["validation"].places
        shared = int(np.isin(held_out, self._rows["train"].places).sum())
        if shared:
            rank_zero_warn(
                f"data.validation: {shared} of its {len(held_out)} rows have a scenario that data.train has too, so "
                "that validation will look better than the model is; `preview` names some."
            )

    def rows(self, split: Split) -> Rows:
        """The usable rows of a split, loaded when first asked for."""
        if split == "test" and self.test is None:
            return self.rows("validation")
        self._follow_view()
        if split in self._rows:
            return self._rows[split]
        if split == "test" or self.validation is not None:
            self._rows[split] = self._load(split)
        elif self.streaming:  # `check` has seen to it that nothing is to be held out
            self._rows["validation"] = Rows.none()
        else:
            kept, held_out = hold_out(self._load("train"), self.validation_share, "data.train", "scenario")
            self._rows.update(train=kept, validation=held_out)
        return self._rows[split]

    def groups(self, split: Split) -> Groups | None:
        """Which group each row of a split belongs to; None where `group_by` is not set, or there are no rows."""
        found = self.rows(split).groups
        if found is not None and self.group_by is not None:
            found.check(self.group_by)
        return found

    def read(self, split: Split) -> Loaded:
        """Usable and rejected rows of a split's own sources, whatever the policy on bad rows."""
        return load(
            self._sources(split),
            functools.partial(_encode, columns=self.columns, view=self._view),
            ("chat", sorted(self.columns.items()), TRUTH),
            self.chat,
            self.tokenizer,
            texts=COLUMNS + TRUTH,
            columns=self._wanted(),
            max_length=self.max_length,
            num_proc=self.num_proc,
            cache_dir=self.cache_dir,
            view=self._view,
            group_by=self.group_by if grouped(self, split) else None,
        )

    @property
    def aligned_share(self) -> float | None:
        """The share of the answers' tokens that align with the teacher's view, over the rows read so far.

        None without a view of the teacher's own, or before there are rows.
        """
        loaded = [rows.aligned.sum(0) for rows in self._rows.values() if rows.aligned is not None]
        streamed = self._stream.aligned if self._stream is not None else np.zeros(2, np.int64)
        aligned, answer = sum(loaded, streamed).tolist()
        return aligned / answer if answer else None

    def train_dataloader(self) -> DataLoader[Any]:
        """Packed rows in the order of (seed, epoch)."""
        if self.streaming:
            rows = PackedRows(None, self.max_length, self.chat.pad_id, teacher=self._view is not None)
            return self.stream_loader(self._rows_to_stream(), rows, self._per_batch)
        check_trainer(self.trainer)
        return self.taken_up(self._loader("train", shuffle=True))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Packed validation rows in a fixed order; nothing when none are held out."""
        return self._loader("validation", shuffle=False) if len(self.rows("validation")) else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Packed test rows in a fixed order; then the same as prompts, if the module that is tested answers them."""
        self._require_test_rows()
        packed = self._loader("test", shuffle=False)
        module = self.trainer.lightning_module if self.trainer else None
        return [packed, self.predict_dataloader()] if getattr(module, "answers_tests", False) else packed

    def predict_dataloader(self) -> DataLoader[Any]:
        """This rank's test rows as prompts: batches are lists of dicts: row_id, prompt_ids and the texts.

        Every rank has as many, for a sharded model answers on all of them at once: some rows may come up twice.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._require_test_rows()
        rows = self.rows("test")
        shared_out = range(rank, world * -(-len(rows) // world), world)
        prompts = _Prompts(rows, self.chat, [place % len(rows) for place in shared_out])
        return DataLoader(prompts, batch_size=self._per_batch, collate_fn=list)

    def _require_test_rows(self) -> None:
        if not len(self.rows("test")):
            raise ValueError("data.test names no rows, and none are held out for validation: set data.test.")

    @property
    def _view(self) -> TeacherView | None:
        """How the teacher reads the rows: None is as the student does, or not at all."""
        view = self.teacher_view
        if view is None and self.trainer is not None and self.trainer.state.fn != "predict":
            view = getattr(self.trainer.lightning_module, "teacher_view", None)
        return None if view is None else view.of(self.chat)

    @property
    def _per_batch(self) -> int:
        return max(1, self.tokens_per_batch // self.max_length)

    def _follow_view(self) -> None:
        """Forgets rows that were read for another view of the teacher."""
        if self._rows_view != self._view:
            self._rows, self.rejected, self._rows_view = {}, [], self._view
            self._row_stream = self._stream = None

    def _wanted(self) -> set[str]:
        return {self.columns.get(name, name) for name in COLUMNS} | {*TRUTH}

    def _sources(self, split: str) -> list[Source]:
        return find_sources(getattr(self, split), f"data.{split}")

    def _load(self, split: Split) -> Rows:
        loaded = self.read(split)
        warning = apply_policy(loaded, f"data.{split}", self.bad_rows, self.max_skipped_share)
        if warning:
            rank_zero_warn(warning)
        self.rejected += loaded.rejected
        if self._view is not None and loaded.rows.aligned is not None:
            aligned, answer = loaded.rows.aligned.sum(0)
            share = f"{aligned / answer:.1%} of the answers' tokens align"
            rank_zero_info(f"data.{split}: teacher view {self._view.view}: {share}.")
        return loaded.rows

    def _loader(self, split: Split, shuffle: bool) -> DataLoader[Any]:
        return packed_loader(
            self.rows(split),
            max_length=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
            pad_id=self.chat.pad_id,
            seed=self.seed,
            shuffle=shuffle,
            num_workers=self.num_workers,
            trainer=self.trainer,
        )

    def _rows_to_stream(self) -> RowStream:
        """The training rows as a stream; only the footers of their files are read by now."""
        self._follow_view()
        if self._row_stream is None:
            view = self._view
            reader = Reader(
                functools.partial(_encode, self.chat, columns=self.columns, view=view),
                self._wanted(),
                max_length=self.max_length,
                seed=self.seed,
                shuffle_buffer=self.shuffle_buffer,
                min_aligned=view.min_aligned if view is not None else 0.0,
            )
            reject = functools.partial(skip_streamed, policy=self.bad_rows, listed=self.rejected)
            self._row_stream = RowStream(
                self._sources("train"), reader, self.num_workers, reject, self.max_skipped_share
            )
        return self._row_stream


class _Prompts(Dataset[dict[str, Any]]):
    """What a model is asked: the prompt of each row, with its texts to hold the answer against."""

    def __init__(self, rows: Rows, chat: Chat, chosen: list[int]) -> None:
        self.rows = rows
        self.chat = chat
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row_id = self.chosen[index]
        row = self.rows.table[row_id]
        prompt = self.chat.encode_prompt(row["scenario"], row["system"])
        return {"row_id": row_id, "prompt_ids": prompt, **{name: row[name] for name in COLUMNS + TRUTH}}


def _encode(chat: Chat, raw: RawRow, columns: dict[str, str], view: TeacherView | None = None) -> list[Record]:
    """A raw row as one record: its tokens and texts, or the reason against it."""
    row = {name: raw.values.get(columns.get(name, name)) for name in COLUMNS}
    nothing: Record = dict.fromkeys(COLUMNS + TRUTH)
    if raw.reason:
        return [{**bad_record(raw.reason, chat.control_ids, view is not None), **nothing}]
    try:
        ids, segments = chat.encode(row)
        told = {name: raw.values.get(name) for name in TRUTH}
        truth = {name: usable_text(name, value) for name, value in told.items() if isinstance(value, str)}
        teacher = None if view is None else view.encode(chat, row)
    except ValueError as error:
        return [{**bad_record(str(error), chat.control_ids, view is not None), **nothing}]
    scenario = render_scenario(row["scenario"])
    tokens = record(ids, segments, chat.control_ids, scenario, teacher)
    return [{**nothing, **tokens, **row, **truth, "scenario": scenario}]
