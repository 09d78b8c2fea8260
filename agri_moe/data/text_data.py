"""TextDataModule: plain text for continued pretraining, in the batches that chat rows make too.

Shapes: S segments (5); the shapes of a batch stand in packing.py.

A document is tokenised with every control token split, gets an end token, and is cut into pieces of at most
`block_size`; a piece is what a row is to chat data. Streamed documents take the way of streaming.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from agri_moe.data.chat import DEFAULT_FORMAT, Chat, ChatFormat, Segment, usable_text
from agri_moe.data.groups import Groups, check_group_by, grouped
from agri_moe.data.packing import PackedRows, check_trainer
from agri_moe.data.rows import (
    BadRows,
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


class TextDataModule(StreamingDataModule):
    """Plain text for continued pretraining.

    Args:
        tokenizer: Folder or hub name of the tokenizer.
        train: A file (text with a document a line, Parquet, JSONL, CSV), folder or glob, here or behind a URL that
            fsspec opens (s3://, gs://, hf://, ...); a hub dataset; or a list of these.
        validation: The same; without it, `validation_share` of the training documents is held out.
        text_column: Column with the text; that of a text file is `text`.
        format: Markers, of which only the end marker is put to use.
        block_size: Longest sequence, in tokens; a longer document is cut into pieces of about one size.
        tokens_per_batch: Tokens of one micro-batch on each rank.
        validation_share: Share of the documents held out when `validation` is not given.
        bad_rows: `error` stops at a document that cannot be used; `skip` leaves it out, counted and listed.
        max_skipped_share: With `skip`, the run stops when a larger share of the documents than this is bad.
        seed: Seed of packing and order.
        num_workers: Processes of each rank that build batches; of streamed documents, that read and tokenise.
        num_proc: Processes that tokenise; whole files are shared out among them.
        streaming: Reads and tokenises on the fly, each rank its own row groups and files: for data that fits no disk.
        shuffle_buffer: Streamed documents that each worker holds and shuffles at a time; 1 keeps the files' order.
        cache_dir: Folder of the tokenised documents; Hugging Face's own by default.
        group_by: Column, or struct.field, by which validation sorts its documents into groups, such as topics or
            languages, at most 64: it then tells the loss of each, and which experts serve it. A document without is a
            bad row.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        text_column: str = "text",
        format: ChatFormat = DEFAULT_FORMAT,
        block_size: int = 256,
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
        self.train, self.validation = train, validation
        self.text_column = text_column
        self.format = format
        self.block_size = block_size
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
        self._rows: dict[str, Rows] = {}
        self._row_stream: RowStream | None = None
        check_numbers(self, "block_size")

    @functools.cached_property
    def chat(self) -> Chat:
        """The tokenizer with its markers, loaded when first asked for."""
        return Chat.load(self.tokenizer, self.format)

    def check(self) -> None:
        """Raises a ValueError on wrong files, column or tokenizer, before anything heavy is loaded."""
        for split in ("train", "validation"):
            if getattr(self, split) is not None:
                wanted = {"text": self.text_column}
                ask = functools.partial(check_columns, wanted=wanted, remedy="data.text_column: NAME")
                of_each(self._sources(split), ask)
        check_held_out(self)
        check_group_by(self)
        _ = self.chat

    def prepare_data(self) -> None:
        """Fills the cache of tokenised documents once per node; the other ranks find it there in `setup`."""
        self.setup(self.trainer.state.fn if self.trainer is not None else None)

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that a stage (fit, validate or test) needs."""
        if not self._rows:
            self.check()
        if stage in (None, "fit"):
            if self.streaming:
                self._rows_to_stream().check(self.trainer.world_size if self.trainer is not None else 1)
            else:
                self.rows("train")
        self.groups("validation")

    def groups(self, split: str) -> Groups | None:
        """Which group each piece of a split belongs to; None where `group_by` is not set, or there are none."""
        found = self.rows(split).groups
        if found is not None and self.group_by is not None:
            found.check(self.group_by)
        return found

    def rows(self, split: str) -> Rows:
        """The pieces of a split (train or validation, which is the test's too), loaded when first asked for."""
        if split == "test":
            return self.rows("validation")
        if split in self._rows:
            return self._rows[split]
        if self.validation is not None:
            self._rows[split] = self._load(split)
        elif self.streaming:  # `check` has seen to it that nothing is to be held out
            self._rows["validation"] = Rows.none()
        else:
            kept, held_out = hold_out(self._load("train"), self.validation_share, "data.train", "document")
            self._rows.update(train=kept, validation=held_out)
        return self._rows[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Packed pieces in the order of (seed, epoch)."""
        if self.streaming:
            rows = PackedRows(None, self.block_size, self.chat.pad_id)
            return self.stream_loader(self._rows_to_stream(), rows, max(1, self.tokens_per_batch // self.block_size))
        check_trainer(self.trainer)
        return self.taken_up(self._loader("train", shuffle=True))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Packed validation pieces in a fixed order; nothing when none are held out."""
        return self._loader("validation", shuffle=False) if len(self.rows("validation")) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation pieces."""
        return self._loader("validation", shuffle=False)

    def _sources(self, split: str) -> list[Source]:
        return find_sources(getattr(self, split), f"data.{split}")

    def _load(self, split: str) -> Rows:
        sources = self._sources(split)
        loaded = load(
            sources,
            functools.partial(_encode, column=self.text_column, block_size=self.block_size),
            ("text", self.text_column, self.block_size),  # the cut is in the cache, so its size is in the key
            self.chat,
            self.tokenizer,
            columns={self.text_column},
            max_length=self.block_size,
            num_proc=self.num_proc,
            cache_dir=self.cache_dir,
            group_by=self.group_by if grouped(self, split) else None,
        )
        warning = apply_policy(loaded, f"data.{split}", self.bad_rows, self.max_skipped_share)
        if warning:
            rank_zero_warn(warning)
        self.rejected += loaded.rejected
        return loaded.rows

    def _rows_to_stream(self) -> RowStream:
        """The training documents as a stream; only the footers of their files are read by now."""
        if self._row_stream is None:
            encode = functools.partial(_encode, self.chat, column=self.text_column, block_size=self.block_size)
            reader = Reader(encode, {self.text_column}, self.block_size, self.seed, self.shuffle_buffer)
            reject = functools.partial(skip_streamed, policy=self.bad_rows, listed=self.rejected)
            self._row_stream = RowStream(
                self._sources("train"), reader, self.num_workers, reject, self.max_skipped_share
            )
        return self._row_stream

    def _loader(self, split: str, shuffle: bool) -> DataLoader[Any]:
        return packed_loader(
            self.rows(split),
            max_length=self.block_size,
            tokens_per_batch=self.tokens_per_batch,
            pad_id=self.chat.pad_id,
            seed=self.seed,
            shuffle=shuffle,
            num_workers=self.num_workers,
            trainer=self.trainer,
        )


def _encode(chat: Chat, raw: RawRow, column: str, block_size: int) -> list[Record]:
    """A document as records of at most `block_size` tokens, or the reason against it."""
    try:
        text = None if raw.reason else usable_text(column, raw.values.get(column))
    except ValueError as error:
        return [bad_record(str(error), chat.control_ids)]
    if text is None:
        return [bad_record(raw.reason or f"{column} is missing or empty", chat.control_ids)]
    ids = [*chat.encode_text(text), chat.end_id]
    # Pieces of one size, not full blocks and a rest: a rest of one token would have nothing to predict.
    pieces = -(-len(ids) // block_size)
    cuts = [len(ids) * i // pieces for i in range(pieces + 1)]
    # Every token of a text is to be predicted, which is what ASSISTANT means to the losses.
    return [
        record(ids[a:b], [int(Segment.ASSISTANT)] * (b - a), chat.control_ids, text)
        for a, b in itertools.pairwise(cuts)
    ]
