"""`preview`: what it prints for good rows, bad rows, configs of both shapes, and wrong arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import write_tokenizer

from agri_moe.tools.preview import preview

ROWS = [{"scenario": f"पत्ती {i} पीली", "thought": "सोच", "advisory": f"सलाह {i}"} for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_it_prints_rows_numbers_and_what_is_wrong(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"scenario": "x", "thought": None, "advisory": ""},
        {"scenario": None, "thought": None, "advisory": "y"},
    ]
    train = write(tmp_path / "train.parquet", [*ROWS, *bad, ROWS[0], ROWS[0]])
    held = write(tmp_path / "held.parquet", [ROWS[0], ROWS[1] | {"advisory": "और"}, bad[0]])
    preview(data=train, tokenizer=tokenizer, validation=held, rows=1)
    said = capsys.readouterr().out
    assert "\x1b[36;7m<|user|>" in said
    assert "\x1b[32m\nसलाह 0" in said
    assert said.count("--- row") == 1
    for line in (
        "rows: 14 read, 12 usable, 2 rejected",
        f"{train} row 10: advisory is empty",
        f"{train} row 11: scenario is missing",
        f"{held} row 2: advisory is empty",
        "repeated rows: 2 (",
        "3 x पत्ती 0 पीली",
        "validation: 3 read, 2 usable, 1 rejected",
        "shared by train and validation: 1 rows, 2 scenarios",
        "tokens a row: p50",
        "tokens a word:",
        "supervised tokens:",
        "packing: ",
    ):
        assert line in said


def test_numbers_of_one_row_by_hand(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    from agri_moe.data.chat import Chat

    preview(data=write(tmp_path / "one.parquet", ROWS[:1]), tokenizer=tokenizer, color=False)
    said = capsys.readouterr().out
    chat = Chat.load(tokenizer)
    ids, segments = chat.encode(ROWS[0])
    supervised = sum(segment >= 3 for segment in segments)
    texts = ("पत्ती 0 पीली", "सोच", "सलाह 0")
    words = sum(len(text.split()) for text in texts)
    tokens = sum(len(chat.encode_text(text)) for text in texts)
    assert "\x1b" not in said
    assert f"--- row 0: {len(ids)} tokens, {supervised} supervised\n{chat.render(ROWS[0])}" in said
    assert f"p50 {len(ids)}, p90 {len(ids)}, p99 {len(ids)}, max {len(ids)}" in said
    assert f"tokens a word: {tokens / words:.2f}" in said
    assert f"supervised tokens: {supervised} of {len(ids)}, {supervised / len(ids):.1%}" in said
    assert f"packing: 1 sequences of 2,048 tokens, {len(ids) / 2048:.1%} full" in said


@pytest.mark.parametrize("named", [False, True])
def test_it_reads_the_data_section_of_a_config(
    tmp_path: Path, tokenizer: str, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": row["scenario"], "answer": row["advisory"]} for row in ROWS]
    data: dict[str, Any] = {
        "train": write(tmp_path / "rows.parquet", rows),
        "tokenizer": tokenizer,
        "columns": {"scenario": "question", "advisory": "answer"},
        "format": {"default_system": "छोटा निर्देश"},
        "max_length": 64,
    }
    section = {"class_path": "agri_moe.data.chat_data.ChatDataModule", "init_args": data} if named else data
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "data": section}), "utf-8")
    preview(config=str(tmp_path / "config.yaml"), color=False)
    said = capsys.readouterr().out
    assert "<|system|>\nछोटा निर्देश\n" in said
    assert "sequences of 64 tokens" in said
    assert "5.0% of the scenarios of train are held out" in said


def test_rows_that_are_all_bad_are_listed_too(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    preview(data=write(tmp_path / "bad.parquet", [row | {"advisory": ""} for row in ROWS]), tokenizer=tokenizer)
    said = capsys.readouterr().out
    assert "rows: 10 read, 0 usable, 10 rejected" in said
    assert said.count("advisory is empty") == 10


def test_wrong_arguments_and_configs_are_one_sentence(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match="preview needs --config FILE, or --data FILE and --tokenizer DIR"):
        preview(data="rows.parquet")
    with pytest.raises(ValueError, match=r"config \S*absent.yaml does not exist"):
        preview(config=str(tmp_path / "absent.yaml"))
    file = tmp_path / "config.yaml"
    for text, message in (
        ("model: {}", "has no data section"),
        ("- a", "is no YAML mapping"),
        ("a: [", "is no YAML mapping"),
        ("data: {class_path: agri_moe.data.text_data.TextDataModule}", "preview looks at chat rows"),
        (f"data: {{train: a.parquet, tokenizer: {tokenizer}, max_lenght: 3}}", "max_lenght"),
        (f"data: {{train: a.parquet, tokenizer: {tokenizer}, max_length: x}}", "max_length"),
        (f"data: {{train: a.parquet, tokenizer: {tokenizer}}}", "data.train: a.parquet does not exist"),
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=message):
            preview(config=str(file))


def test_importing_the_tool_imports_nothing_heavy() -> None:
    code = "import sys, agri_moe.tools.preview; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
