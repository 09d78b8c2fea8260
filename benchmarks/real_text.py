"""The real texts as documents for continued pretraining, each with the domain that it comes from.

Four domains: questions on plant diseases and on soil (English: question, sentence, answer), news (Hindi sentences, ten
to a document) and encyclopaedia passages with their questions (Hindi). Nothing that is held out stands in training, and
nothing stands there twice.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
SPLITS = {"train": "train", "validation": "val"}
SENTENCES = 10  # of news to a document
HELD_OUT = 0.1  # share of the news documents


def documents(split: str) -> list[dict[str, str]]:
    """Every document of a split (train or validation): text and domain, in an order that hangs on nothing else."""
    found = {
        text: domain
        for domain, texts in (
            ("plant_disease", _questions("plant_disease", split)),
            ("soil", _questions("soil", split)),
            ("news_hi", _news(split)),
            ("passages_hi", _passages(split)),
        )
        for text in texts
    }
    ordered = sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    return [{"text": text, "domain": found[text]} for text in ordered]


def write_documents(folder: Path) -> dict[str, Path]:
    """train.parquet and validation.parquet in a folder, which stays as it is where they are there."""
    if not DATA.is_dir():
        raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real rows.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.parquet" for split in SPLITS}
    for split, file in files.items():
        if not file.exists():
            pq.write_table(pa.Table.from_pylist(documents(split)), file)
    return files


def _rows(name: str, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(DATA / f"{name}_{SPLITS[split]}.parquet").to_pylist()
    return rows


def _questions(name: str, split: str) -> Iterator[str]:
    """A question, the sentence that it was made from, and the answer."""
    for row in _rows(name, split):
        yield "\n".join((row["scenario"], row["thought"], row["advisory"]))


def _news(split: str) -> Iterator[str]:
    """Sentences in their order, ten at a time; every tenth document is held out."""
    lines = (DATA / "hindi_text.txt").read_text("utf-8").splitlines()
    for i, start in enumerate(range(0, len(lines), SENTENCES)):
        if (i % round(1 / HELD_OUT) == 0) == (split == "validation"):
            yield "\n".join(lines[start : start + SENTENCES])


def _passages(split: str) -> Iterator[str]:
    """A passage, and below it its questions with their answers."""
    asked: dict[str, list[str]] = {}
    for row in _rows("hindi_qa", split):
        passage, question = row["scenario"].values()
        asked.setdefault(passage, []).append(f"{question} {row['advisory']}")
    for passage, questions in asked.items():
        yield "\n".join((passage, *questions))
