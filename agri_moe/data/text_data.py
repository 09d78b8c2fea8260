"""TextDataModule: plain text for continued pretraining, in the batches that chat rows make too.

Shapes: S segments (5); the shapes of a batch stand in packing.py.

A document is tokenised with every control token split, gets an end token, and is cut into pieces of at most
`block_size`; a piece is what a row is to chat data.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from agri_moe.data.chat import DEFAULT_FORMAT, Chat, ChatFormat, Segment, usable_text
from agri_moe.data.packing import check_trainer
from agri_moe.data.rows import (
    BadRows,
    Record,
    Rejected,
    Rows,
    apply_policy,
    bad_record,
    check_numbers,
    hold_out,
    load,
    packed_loader,
    record,
)
from agri_moe.data.sources import RawRow, Source, check_columns, find_sources


class TextDataModule(LightningDataModule):
    """Plain text for continued pretraining.

    Args:
        tokenizer: Folder or hub name of the tokenizer.
        train: A file (text with a document a line, Parquet, JSONL, CSV), folder, glob, hub dataset, or list.
        validation: The same; without it, `validation_share` of the training documents is held out.
        text_column: Column with the text; that of a text file is `text`.
        format: Markers, of which only the end marker is put to use.
        block_size: Longest sequence, in tokens; a longer document is cut into pieces of about one size.
        tokens_per_batch: Tokens of one micro-batch on each rank.
        validation_share: Share of the documents held out when `validation` is not given.
        bad_rows: `error` stops at a document that cannot be used; `skip` leaves it out, counted and listed.
        max_skipped_share: With `skip`, the run stops when a larger share of the documents than this is bad.
        seed: Seed of packing and order.
        num_workers: Processes that build batches.
        num_proc: Processes that tokenise; whole files are shared out among them.
        cache_dir: Folder of the tokenised documents; Hugging Face's own by default.
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
        cache_dir: str | None = None,
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
        self.cache_dir = cache_dir
        self.rejected: list[Rejected] = []
        self._rows: dict[str, Rows] = {}
        check_numbers(self, "block_size")

    @functools.cached_property
    def chat(self) -> Chat:
        """The tokenizer with its markers, loaded when first asked for."""
        return Chat.load(self.tokenizer, self.format)

    def check(self) -> None:
        """Raises a ValueError on wrong files, column or tokenizer, before anything heavy is loaded."""
        for split in ("train", "validation"):
            if getattr(self, split) is not None:
                for source in self._sources(split):
                    check_columns(source, {"text": self.text_column}, "data.text_column: NAME")
        _ = self.chat

    def prepare_data(self) -> None:
        """Fills the cache of tokenised documents once per node; the other ranks find it there in `setup`."""
        self.setup(self.trainer.state.fn if self.trainer is not None else None)

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that a stage (fit, validate or test) needs."""
        if not self._rows:
            self.check()
        if stage in (None, "fit"):
            self.rows("train")
        self.rows("validation")

    def rows(self, split: str) -> Rows:
        """The pieces of a split (train or validation), loaded when first asked for."""
        if split in self._rows:
            return self._rows[split]
        if self.validation is not None:
            self._rows[split] = self._load(split)
        else:
            kept, held_out = hold_out(self._load("train"), self.validation_share, "data.train", "document")
            self._rows.update(train=kept, validation=held_out)
        return self._rows[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Packed pieces in the order of (seed, epoch)."""
        check_trainer(self.trainer)
        return self._loader("train", shuffle=True)

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
        )
        warning = apply_policy(loaded, f"data.{split}", self.bad_rows, self.max_skipped_share)
        if warning:
            rank_zero_warn(warning)
        self.rejected += loaded.rejected
        return loaded.rows

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
