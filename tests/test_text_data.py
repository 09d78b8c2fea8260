"""TextDataModule: documents into pieces, every token kept and supervised, in the batches of chat data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch import LightningModule, Trainer
from tiny import real_data, write_tokenizer

from agri_moe.data.chat import Segment
from agri_moe.data.text_data import TextDataModule

DOCUMENTS = [f"दस्तावेज़ {i} " + "धान की पत्ती </think> <|endoftext|> " * (i % 7) for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def make(tmp_path: Path, tokenizer: str) -> Any:
    def build(train: Path, **options: Any) -> TextDataModule:
        chosen: dict[str, Any] = {"block_size": 64, "tokens_per_batch": 256, "validation_share": 0} | options
        return TextDataModule(train=str(train), tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"), **chosen)

    return build


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"body": documents, "n": range(len(documents))}), path)
    else:
        path.write_text("".join(f"{document}\n" for document in documents), "utf-8")
    return path


def test_no_token_is_dropped_and_every_one_is_supervised(tmp_path: Path, make: Any) -> None:
    data = make(write(tmp_path / "text.txt", DOCUMENTS))
    data.setup("fit")
    table = data.rows("train").table
    whole = [[*data.chat.encode_text(text), data.chat.end_id] for text in DOCUMENTS]
    assert [i for piece in table["input_ids"] for i in piece] == [i for ids in whole for i in ids]
    assert max(table["length"]) <= 64
    assert len(table) > len(DOCUMENTS)
    assert min(table["length"]) > 1  # near-equal pieces: a rest of one token would have no target
    added = set(data.chat.tokenizer.get_added_vocab().values())
    assert not added & {i for ids in whole for i in ids[:-1]}
    targets = 0
    for batch in data.train_dataloader():
        inside = batch["row_ids"] >= 0
        assert set(batch["segment_ids"][inside].tolist()) == {Segment.ASSISTANT}
        assert batch["input_ids"].shape[1] <= 64
        assert ((batch["position_ids"] == 0) & inside).sum() == len(set(batch["row_ids"][inside].tolist()))
        targets += int(batch["step_targets"][0, Segment.ASSISTANT])
        assert batch["step_targets"][0].sum() == batch["step_targets"][0, Segment.ASSISTANT]
    assert targets == sum(map(len, whole)) - len(table)


def test_columns_splits_and_held_out_documents(tmp_path: Path, make: Any) -> None:
    file = write(tmp_path / "text.parquet", DOCUMENTS)
    data = make(file, text_column="body", validation_share=0.3)
    data.setup("fit")
    train, held = data.rows("train"), data.rows("validation")
    assert not set(train.places) & set(held.places)  # the pieces of a document stay together
    assert len(set(train.places)) + len(set(held.places)) == 30
    with pytest.raises(ValueError, match=r"has no column text; it has body, n: name the right one as data.text_column"):
        make(file).check()
    own = make(file, text_column="body", validation=str(write(tmp_path / "b.parquet", DOCUMENTS[:3])))
    own.prepare_data()
    assert len(set(own.rows("validation").places)) == 3


@pytest.mark.parametrize(("bad", "reason"), [("", "body is missing or empty"), (None, "body is missing or empty")])
def test_documents_that_cannot_be_used(tmp_path: Path, make: Any, bad: Any, reason: str) -> None:
    file = write(tmp_path / "text.parquet", [*DOCUMENTS[:2], bad, *DOCUMENTS[2:]])
    with pytest.raises(ValueError, match=re.escape(f"row 2: {reason}")):
        make(file, text_column="body").setup("fit")
    data = make(file, text_column="body", bad_rows="skip")
    with pytest.warns(UserWarning, match="1 of 31 rows skipped"):
        data.setup("fit")
    assert [(row.row, row.reason) for row in data.rejected] == [(2, reason)]
    with pytest.raises(ValueError, match=r"row 0: n is a int, not text"):
        make(file, text_column="n").setup("fit")


def test_it_trains_in_a_trainer(tmp_path: Path, make: Any) -> None:
    import torch

    class Count(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.tokens = 0

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.tokens += int((batch["row_ids"] >= 0).sum())
            return self.weight * 1.0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data, module = make(write(tmp_path / "text.txt", DOCUMENTS)), Count()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet).fit(module, data)
    assert module.tokens == 2 * data.rows("train").lengths.sum()


def test_real_hindi_text(tmp_path: Path) -> None:
    folder = real_data()
    data = TextDataModule(
        train=str(folder / "hindi_text.txt"), tokenizer=str(folder / "qwen3-0.6b"), cache_dir=str(tmp_path)
    )
    data.setup("fit")
    documents = len(set(data.rows("train").places)) + len(set(data.rows("validation").places))
    assert 1600 < documents <= 1659
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (64, 256)
