"""The real texts as documents for continued pretraining, each with the domain that it comes from.

Four domains: questions on plant diseases and on soil (English: question, sentence, answer), news (Hindi sentences, ten
to a document) and encyclopaedia passages with their questions (Hindi). Nothing that is held out stands in training, and
nothing stands there twice. The training documents come in two halves, with no source sentence in both: a model that has
been trained on the first can go on with the second.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
SPLITS = {"first": "train", "second": "train", "validation": "val"}
"""Part -> what it is called in the names of the files that it is read from."""
SENTENCES = 10  # of news to a document
HELD_OUT = 10  # one news document in so many


def documents(part: str) -> list[dict[str, str]]:
    """Every document of a part (first, second or validation): text and domain, in an order that hangs on nothing else.

    The halves are told apart by a hash of what a text was made from.
    """
    readers = {
        "plant_disease": _questions("plant_disease", part),
        "soil": _questions("soil", part),
        "news_hi": _news(part),
        "passages_hi": _passages(part),
    }
    found = {
        text: domain
        for domain, texts in readers.items()
        for source, text in texts
        if part == "validation" or (part == "first") == (_digest(source)[0] % 2 == 0)
    }
    return [{"text": text, "domain": found[text]} for text in sorted(found, key=_digest)]


def write_documents(folder: Path) -> dict[str, Path]:
    """A Parquet file for each part in a folder, which stays as it is where they are there."""
    if not DATA.is_dir():
        raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real rows.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: folder / f"{part}.parquet" for part in SPLITS}
    for part, file in files.items():
        if not file.exists():
            pq.write_table(pa.Table.from_pylist(documents(part)), file)
    return files


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _rows(name: str, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(DATA / f"{name}_{SPLITS[part]}.parquet").to_pylist()
    return rows


def _questions(name: str, part: str) -> Iterator[tuple[str, str]]:
    """A sentence; and a question, that sentence, which it was made from, and the answer."""
    for row in _rows(name, part):
        yield row["thought"], "\n".join((row["scenario"], row["thought"], row["advisory"]))


def _news(part: str) -> Iterator[tuple[str, str]]:
    """Sentences in their order, ten at a time; every tenth document is held out."""
    lines = (DATA / "hindi_text.txt").read_text("utf-8").splitlines()
    for i, start in enumerate(range(0, len(lines), SENTENCES)):
        if (i % HELD_OUT == 0) == (part == "validation"):
            text = "\n".join(lines[start : start + SENTENCES])
            yield text, text


def _passages(part: str) -> Iterator[tuple[str, str]]:
    """A passage; and that passage with its questions and their answers below it."""
    asked: dict[str, list[str]] = {}
    for row in _rows("hindi_qa", part):
        passage, question = row["scenario"].values()
        asked.setdefault(passage, []).append(f"{question} {row['advisory']}")
    for passage, questions in asked.items():
        yield passage, "\n".join((passage, *questions))
