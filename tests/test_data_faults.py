"""Files and rows that are wrong, each a real file: refused by file and row, or skipped, counted and capped.

What a damaged file or a row of the wrong type is told stands in test_chat_data.py; here is what several files, a
stream, and the texts themselves can get wrong.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.text_data import TextDataModule
from agri_moe.generation import Generated
from agri_moe.tools.generate import Filters

GOOD = {"scenario": "फसल: धान", "advisory": "नीम का तेल छिड़कें।"}


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Any:
    """A data module over files of this test."""

    def made(train: Any, **options: Any) -> ChatDataModule:
        given = {"validation_share": 0.0, "max_length": 256, "cache_dir": str(tmp_path / "cache")} | options
        return ChatDataModule(tokenizer=str(corpus / "tokenizer"), train=train, **given)

    return made


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_files_of_different_schemas_are_read_each_by_its_own(make: Any, tmp_path: Path) -> None:
    """A struct here and a text there, columns more or fewer, another order; a wrong type names its file and row."""
    first = parquet(tmp_path / "a.parquet", scenario=[{"crop": "धान"}, {"crop": "चना"}], advisory=["क", "ख"])
    second = parquet(tmp_path / "b.parquet", extra=[1], advisory=pa.array(["ग"], pa.large_string()), scenario=["मक्का"])
    third = jsonl(
        tmp_path / "c.jsonl", [GOOD, {"scenario": {"crop": "गेहूँ", "days": 3}, "advisory": "घ", "thought": "च"}]
    )
    table = make([first, second, third]).rows("train").table
    assert table["scenario"][:] == ["crop: धान", "crop: चना", "मक्का", GOOD["scenario"], "crop: गेहूँ\ndays: 3"]
    assert table["thought"][:] == [None, None, None, None, "च"]
    wrong = parquet(tmp_path / "d.parquet", scenario=["a", "b"], advisory=[1.5, 2.5])
    with pytest.raises(ValueError, match=r"d.parquet row 0: advisory is a float, not text \(2 such rows in all\)"):
        make([first, wrong]).setup("fit")
    lacking = parquet(tmp_path / "e.parquet", scenario=["a"], answer=["b"])
    with pytest.raises(ValueError, match=r"e.parquet has no column advisory; it has scenario, answer"):
        make([first, lacking]).setup("fit")
    data = make([first, wrong], bad_rows="skip")
    with pytest.warns(UserWarning, match=r"2 of 4 rows skipped \(2 x advisory is a float, not text\)"):
        data.setup("fit")
    assert [str(row) for row in data.rejected] == [f"{wrong} row {n}: advisory is a float, not text" for n in range(2)]


def test_rows_of_one_file_that_differ(make: Any, tmp_path: Path) -> None:
    """JSONL has no schema: each line is judged by itself."""
    rows = [
        GOOD,
        {"scenario": 5, "advisory": "a"},
        {"advisory": "a"},
        {"scenario": "a"},
        {},
        GOOD | {"thought": {}},
        GOOD,
    ]
    data = make(jsonl(tmp_path / "rows.jsonl", rows), bad_rows="skip")
    with pytest.warns(UserWarning, match="5 of 7 rows skipped"):
        data.setup("fit")
    assert [(row.row, row.reason) for row in data.rejected] == [
        (1, "scenario is a int, not text"),
        (2, "scenario is missing"),
        (3, "advisory is missing"),
        (4, "scenario is missing"),
        (5, "thought is a dict, not text"),
    ]
    assert len(data.rows("train")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "</think> पहले बंद <think>",
        "<think> खुला रह गया",
        "<|assistant|> उत्तर <|thought|> विचार <|endoftext|> और",
        "<think><think></think>",
        "<|thought|>\nx\n<|assistant|>\ny\n<|endoftext|>",
    ],
)
def test_markers_in_free_text_in_any_order_stay_text(text: str, make: Any, tmp_path: Path) -> None:
    """In every column: the row has its own markers, each once, and the text comes back as it was."""
    row = {name: f"{text} {name}" for name in ("scenario", "thought", "advisory", "system")}
    data = make(jsonl(tmp_path / "rows.jsonl", [row]))
    ids = data.rows("train").table["input_ids"][0]
    chat = data.chat
    names = [name for i in ids for name, marker in chat.marker_ids.items() if i == marker]
    assert names == ["system", "user", "thought", "assistant", "end"]
    assert chat.tokenizer.decode(ids) == chat.render(row)
    prompt = chat.encode_prompt(row["scenario"], row["system"])
    answer = chat.parse(ids[len(prompt) - 1 :])
    assert (answer.thought, answer.advisory, answer.complete) == (row["thought"], row["advisory"], True)


@pytest.mark.parametrize(
    ("thought", "advisory", "fit"),
    [
        ("सोच", "सलाह", True),
        ("सोच", "सलाह</think>", False),
        ("सोच <think> और", "सलाह", False),
        ("सोच", "<think>सलाह", False),
    ],
)
def test_what_a_teacher_wrote_with_markers_left_in_it_is_no_row(thought: str, advisory: str, fit: bool) -> None:
    """Once the answer has been taken apart, none should be left: they were out of order."""
    reason = Filters().reason(Generated(thought, advisory, 9, "end"), tokens=3)
    assert reason == ("" if fit else "markers of a thought out of order")


def test_plain_text_with_markers_stays_text(corpus: Path, tmp_path: Path) -> None:
    lines = ("</think> a <think>", "<|endoftext|> b <|user|>")
    (tmp_path / "text.txt").write_text("\n".join(lines))
    data = TextDataModule(
        tokenizer=str(corpus / "tokenizer"),
        train=str(tmp_path / "text.txt"),
        validation_share=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    for ids, text in zip(
        data.rows("train").table["input_ids"][:], ("</think> a <think>", "<|endoftext|> b <|user|>"), strict=True
    ):
        assert [i for i in ids if i in data.chat.control_ids] == [data.chat.end_id]
        assert data.chat.tokenizer.decode(ids[:-1]) == text


def test_rows_of_validation_that_are_trained_on_are_told(make: Any, tmp_path: Path, recwarn: Any) -> None:
    """By scenario, which is what a model is asked; a held-out share never has any."""
    rows = [{"scenario": f"फसल {i}", "advisory": "सलाह"} for i in range(20)]
    train = jsonl(tmp_path / "train.jsonl", rows)
    validation = jsonl(tmp_path / "validation.jsonl", [rows[3], rows[4] | {"advisory": "अन्य"}, GOOD])
    with pytest.warns(UserWarning, match=r"data.validation: 2 of its 3 rows have a scenario that data.train has too"):
        make(train, validation=validation).setup("fit")
    recwarn.clear()
    make(train, validation_share=0.3).setup("fit")
    assert not [w for w in recwarn if "data.train has too" in str(w.message)]


def test_a_file_that_is_named_twice_is_refused(make: Any, tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r"names \S+train.jsonl twice"):
        make([train, str(tmp_path)]).setup("fit")


# ---------------------------------------------------------------------- streams


def stream(data: ChatDataModule) -> list[int]:
    """The rows of one epoch."""
    return [row for batch in data.train_dataloader() for row in sorted({*batch["row_ids"].flatten().tolist()} - {-1})]


@pytest.mark.parametrize("bad", [1, 3])
def test_a_stream_stops_where_too_many_rows_are_skipped(bad: int, make: Any, tmp_path: Path) -> None:
    """At the end of an epoch by its own share, whatever file is read first."""
    rows = [GOOD] * (20 - bad) + [{"scenario": "a", "advisory": ""}] * bad
    data = make(jsonl(tmp_path / "rows.jsonl", rows), bad_rows="skip", max_skipped_share=0.1, streaming=True)
    data.setup("fit")
    told = pytest.warns(UserWarning, match=r"skipped \S+rows.jsonl row \d+: advisory is empty")
    if bad == 1:
        with told:
            assert len(stream(data)) == 19
        return
    with told, pytest.raises(ValueError, match=r"data.train: 3 of 20 rows cannot be used, more than .*_share 0.1"):
        stream(data)


def test_a_long_stream_does_not_wait_for_its_end_to_stop(make: Any, tmp_path: Path) -> None:
    """After a thousand rows, or as soon as there are too many for a thousand."""
    rows = [{"scenario": "a", "advisory": ""}] * 150 + [GOOD] * 3000
    file = jsonl(tmp_path / "rows.jsonl", rows)
    data = make(file, bad_rows="skip", max_skipped_share=0.1, streaming=True, shuffle_buffer=1, tokens_per_batch=512)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=r"1\d\d of 1\d\d rows cannot"):
        next(batches)


def test_counts_of_skipped_rows_go_on_with_the_stream(make: Any, tmp_path: Path) -> None:
    """They are part of the place that a checkpoint holds."""
    bad = {"scenario": "a", "advisory": ""}
    rows = [row for _ in range(12) for row in (GOOD, bad, GOOD)]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    options = {"bad_rows": "skip", "streaming": True, "shuffle_buffer": 1, "tokens_per_batch": 256, "max_length": 256}
    data = make(file, **options)
    data.setup("fit")
    loader = data.train_dataloader()
    with pytest.warns(UserWarning, match="skipped"):
        _ = list(loader)
    counted = [cursor.get("counted") for _, cursor in data._stream.starts]
    share = data._stream.stream.open({"epoch": 0}, 0, 1)
    while share.peek() is not None:
        share.take()
    assert share.counted == (12, 36)
    assert counted[0] is None or counted[0] == [0, 0]


# ---------------------------------------------------------------------- anything at all

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(("scenario", "advisory", "thought", "system"), values))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.one_of(fields, values), min_size=1, max_size=5).filter(lambda rows: not isinstance(rows[0], list))
)
def test_whatever_a_line_says_it_is_used_or_there_is_a_reason(
    rows: list[Any], tmp_path_factory: Any, chat: Any
) -> None:
    from agri_moe.data.chat_data import _encode
    from agri_moe.data.sources import Source, read_rows

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    read = list(read_rows(Source(str(path), "jsonl")))
    assert [raw.number for raw in read] == list(range(len(rows)))
    for raw in read:
        (record,) = _encode(chat, raw, {})
        assert bool(record["reason"]) != bool(record["input_ids"])
