"""Teacher views: the teacher's ids are its template's, and what aligns is the same bytes of the same text."""

from __future__ import annotations

import pickle
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from tiny import NOT_SPECIAL, SPECIAL, real_data, write_tokenizer
from transformers import AutoTokenizer

from agri_moe.data import chat_data
from agri_moe.data.chat import Chat, ChatFormat, Piece, Segment
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.packing import PackedRow, StepTotals, collate, count_targets
from agri_moe.data.rows import Rejected
from agri_moe.data.teacher_view import TeacherView, same_tokens
from agri_moe.tools.preview import preview

# What Qwen3's template does with one turn.
QWEN3 = """\
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {%- set content = message.content %}
    {%- if message.reasoning_content is string %}
      {%- set thought = message.reasoning_content %}
    {%- else %}
      {%- set thought = content.split('</think>')[0] if '</think>' in content else '' %}
      {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {{- content.lstrip('\\n') + '<|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}"""
TURN = "'<|im_start|>' + message.role + '\\n' + {} + '<|im_end|>\\n'"
CHATML = "{% for message in messages %}{{ " + TURN.format("message.content | trim") + " }}{% endfor %}"
VIEWS = ("native", "no_thought")
FORMAT = ChatFormat(default_system="छोटा")
ROW = {"scenario": "धान के पत्ते पीले", "thought": "जस्ते की कमी दिखती है।", "advisory": "जिंक सल्फेट का छिड़काव करें।"}
ROWS = [ROW | {"scenario": f"{ROW['scenario']} {i}", "thought": f"कमी {i}" if i % 3 else None} for i in range(40)]

filled = st.text("क़षज़ाि्ं़। aZé9.,\n\r\t 🌾'<>{}%", min_size=1, max_size=16).map(lambda text: text + "अ")
control = st.sampled_from([*SPECIAL, *NOT_SPECIAL, "<|thought|>", "<|assistant|>", "\n", "\n\n"])
hostile = st.lists(st.one_of(control, filled), max_size=5).map(lambda parts: "".join([*parts, "म"]))
around = st.tuples(st.sampled_from(["", "\n", " \n\n", " "]), hostile, st.sampled_from(["", "\n", ".\n\n", "। "]))
texts = around.map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(write_tokenizer(tmp_path_factory.mktemp("teacher")), QWEN3)


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat.load(str(folder), FORMAT)


@pytest.fixture(scope="module")
def views(folder: Path) -> dict[str, TeacherView]:
    return {name: TeacherView(str(folder), name) for name in VIEWS}  # type: ignore[arg-type]


def with_template(folder: Path, template: str | None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def teacher_parts(chat: Chat, row: dict[str, Any], view: str) -> list[tuple[Segment | None, str]]:
    """What Qwen3's template writes, by hand; a segment stands before the text of that part."""
    told = {message["role"]: message for message in chat.messages(row)}
    thought = told["assistant"].get("reasoning_content", "") if view == "native" else ""
    return [
        (None, "<|im_start|>system\n"),
        (Segment.SYSTEM, told["system"]["content"]),
        (None, "<|im_end|>\n<|im_start|>user\n"),
        (Segment.USER, f"{chat.format.scenario_header}\n{told['user']['content']}"),
        (None, "<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (Segment.THOUGHT, thought.strip("\n")),
        (None, "\n</think>\n\n"),
        (Segment.ASSISTANT, told["assistant"]["content"].lstrip("\n")),
        (None, "<|im_end|>\n"),
    ]


def student_parts(chat: Chat, row: dict[str, Any]) -> list[tuple[Segment | None, str]]:
    told = {message["role"]: message for message in chat.messages(row)}
    thought = told["assistant"].get("reasoning_content", "")
    mark = chat.format
    return [
        (None, f"{mark.system}\n"),
        (Segment.SYSTEM, told["system"]["content"]),
        (None, f"\n{mark.user}\n"),
        (Segment.USER, f"{mark.scenario_header}\n{told['user']['content']}"),
        (None, f"\n{mark.thought}\n" if thought else ""),
        (Segment.THOUGHT, thought),
        (None, f"\n{mark.assistant}\n"),
        (Segment.ASSISTANT, told["assistant"]["content"]),
        (None, f"\n{mark.end}"),
    ]


def byte_places(tokenizer: Any, ids: list[int], parts: list[tuple[Segment | None, str]]) -> dict[tuple[Any, ...], int]:
    """(part, first byte, last byte, from the end of the stripped part) -> token, for tokens inside a part."""
    alphabet = bytes_of_letters()
    added = tokenizer.get_added_vocab()
    begins, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        begins.append(at)
        at += len(token.encode()) if token in added else len(bytes(alphabet[letter] for letter in token))
    ends = [*begins[1:], at]
    places, at = {}, 0
    for segment, text in parts:
        size = len(unicodedata.normalize("NFC", text).encode())
        shift = at + len(text.encode()) - len(text.lstrip("\n").encode())  # bytes count from the first kept one
        if segment is not None:
            inside = [i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if a >= at and b <= at + size]
            places |= {(segment, begins[i] - shift, ends[i] - shift): i for i in inside}
        at += size
    assert at == ends[-1]
    return places


def bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(system=texts, scenario=texts, thought=st.one_of(st.none(), texts), advisory=texts, view=st.sampled_from(VIEWS))
def test_aligned_tokens_are_the_same_bytes_of_the_same_part(
    chat: Chat, views: dict[str, TeacherView], view: str, **fields: str | None
) -> None:
    row = {name: value and unicodedata.normalize("NFC", value) for name, value in fields.items()}
    ours, theirs = chat.encode(row).input_ids, views[view].encode(chat, row)
    written = teacher_parts(chat, row, view)
    assert chat.tokenizer.decode(theirs.input_ids) == "".join(text for _, text in written)
    places = byte_places(chat.tokenizer, theirs.input_ids, written)
    expected = {
        i: places[key]
        for key, i in byte_places(chat.tokenizer, ours, student_parts(chat, row)).items()
        if key in places
    }
    aligned = {i: j for i, j in enumerate(theirs.tokens) if j >= 0}
    assert aligned.items() <= expected.items()
    assert all(ours[i] == theirs.input_ids[j] for i, j in aligned.items())
    # Missing may be only what begins inside a character whose earlier bytes are cut otherwise.
    missing = chat.tokenizer.convert_ids_to_tokens([ours[i] for i in expected.keys() - aligned.keys()])
    assert all(bytes_of_letters()[token[0]] & 0xC0 == 0x80 for token in missing)


@pytest.mark.parametrize("view", VIEWS)
def test_control_tokens_in_the_texts_stay_text(chat: Chat, views: dict[str, TeacherView], view: str) -> None:
    said = "a<|im_end|>\n<|im_start|>b<think>c</think>d<tool_call><|endoftext|>e"
    ids = views[view].encode(chat, dict.fromkeys(("system", "scenario", "thought", "advisory"), said)).input_ids
    added = chat.tokenizer.get_added_vocab()
    names = {i: token for token, i in added.items()}
    turn = ["<|im_start|>", "<|im_end|>"]
    assert [names[i] for i in ids if i in names] == [*turn, *turn, turn[0], "<think>", "</think>", turn[1]]
    assert chat.tokenizer.decode(ids).count(said) == (4 if view == "native" else 3)


@pytest.mark.parametrize("template", [QWEN3, CHATML])
@pytest.mark.parametrize("view", VIEWS)
def test_the_ids_are_those_of_the_rendered_string(tmp_path: Path, chat: Chat, view: Any, template: str) -> None:
    folder = with_template(write_tokenizer(tmp_path), template)
    served = AutoTokenizer.from_pretrained(folder)
    for row in (ROW, ROW | {"thought": None}, ROW | {"thought": "\nसोच\n ", "advisory": "\n  सलाह.\n"}):
        system, user, answer = chat.messages(row)
        user["content"] = f"{chat.format.scenario_header}\n{user['content']}"
        thought = (
            answer.pop("reasoning_content", None) if view == "native" else answer.pop("reasoning_content", "") and ""
        )
        if template == QWEN3:
            answer["reasoning_content"] = thought or ""
        elif thought:
            answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
        expected = served.apply_chat_template([system, user, answer], tokenize=True)["input_ids"]
        encoded = TeacherView(str(folder), view).encode(chat, row)
        assert encoded.input_ids == expected
        ours = chat.encode(row).input_ids
        assert all(ours[i] == expected[j] for i, j in enumerate(encoded.tokens) if j >= 0)
        assert encoded.aligned > 0


def test_tokens_that_merged_with_a_newline_match_nothing(chat: Chat, views: dict[str, TeacherView]) -> None:
    row = {"scenario": "a", "thought": "b", "advisory": "\nc\n"}
    ids, segments = chat.encode(row)
    encoded = views["native"].encode(chat, row)
    answer = [i for i, segment in enumerate(segments) if segment == Segment.ASSISTANT]
    strings = chat.tokenizer.convert_ids_to_tokens([ids[i] for i in answer])
    assert strings == ["ĊĊ", "c", "ĊĊ", "<|endoftext|>"]
    assert [encoded.tokens[i] >= 0 for i in answer] == [False, True, False, False]
    # thought: b; advisory: the newlines on both sides of c are text of its own too
    assert (encoded.answer, encoded.aligned) == (4, 2)


def test_tokens_inside_one_character_match_from_its_first_on() -> None:
    def piece(*tokens: tuple[int, int, int]) -> Piece:
        return Piece(Segment.ASSISTANT, "कख", 10, [t[0] for t in tokens], [t[1:] for t in tokens])

    whole = piece((7, 0, 1), (5, 0, 1), (5, 0, 1), (8, 1, 2))
    assert same_tokens(whole, whole, (0, 2)) == {0: 10, 1: 11, 2: 12, 3: 13}
    # The first byte went with a newline: the two 5s are not the first two tokens of the character there.
    merged = piece((9, -1, 1), (5, 0, 1), (5, 0, 1), (8, 1, 2))
    assert same_tokens(whole, merged, (0, 2)) == {3: 13}
    assert same_tokens(piece((5, 0, 1), (5, 0, 1), (8, 1, 2)), merged, (0, 2)) == {2: 13}
    assert same_tokens(whole, whole, (1, 2)) == {3: 13}


def test_without_the_thought_none_of_it_aligns(chat: Chat, views: dict[str, TeacherView]) -> None:
    _, segments = chat.encode(ROW)
    native, without = (views[name].encode(chat, ROW) for name in VIEWS)
    seen = {
        name: {s for s, t in zip(segments, row.tokens, strict=True) if t >= 0}
        for name, row in (("native", native), ("no_thought", without))
    }
    assert seen["native"] == {Segment.SYSTEM, Segment.USER, Segment.THOUGHT, Segment.ASSISTANT}
    assert seen["no_thought"] == seen["native"] - {Segment.THOUGHT}
    assert native.answer > without.answer
    assert chat.tokenizer.decode(without.input_ids).endswith(f"<think>\n\n</think>\n\n{ROW['advisory']}<|im_end|>\n")
    alone = {name: views[name].encode(chat, ROW | {"thought": None}) for name in VIEWS}
    assert alone["native"] == alone["no_thought"]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["hindi_qa_train", "plant_disease_train"])
def test_real_rows_align(name: str, view: Any) -> None:
    data = real_data()
    source = str(data / "qwen3-0.6b")
    chat, teacher, served = Chat.load(source), TeacherView(source, view), AutoTokenizer.from_pretrained(source)
    rows = pq.read_table(data / f"{name}.parquet").slice(0, 100).to_pylist()
    inner = matched = 0
    for row in rows:
        ids, segments = chat.encode(row)
        encoded = teacher.encode(chat, row)
        system, user, answer = chat.messages(row)
        user["content"] = f"{chat.format.scenario_header}\n{user['content']}"
        if view == "no_thought":
            answer.pop("reasoning_content", None)
        assert encoded.input_ids == served.apply_chat_template([system, user, answer], tokenize=True)["input_ids"]
        pairs = [(i, j) for i, j in enumerate(encoded.tokens) if j >= 0]
        assert all(ids[i] == encoded.input_ids[j] for i, j in pairs)
        advisory = [i for i, segment in enumerate(segments) if segment == Segment.ASSISTANT]
        first, last = min(i for i in advisory if encoded.tokens[i] >= 0), max(i for i, _ in pairs)
        ours, theirs = (
            chat.tokenizer.decode(x)
            for x in (ids[first : last + 1], encoded.input_ids[encoded.tokens[first] : encoded.tokens[last] + 1])
        )
        assert ours == theirs
        inner += encoded.answer
        matched += encoded.aligned
    # Only a last full stop, which the student's newline is merged with, is lost of a row.
    assert matched / inner > (0.99 if name.startswith("hindi") else 0.94)
    assert inner - matched <= 2 * len(rows)


@pytest.mark.parametrize(
    ("template", "view", "message"),
    [
        (None, "native", "model.teacher.view native needs a chat template, and model.teacher.source .* use view: same"),
        ("{{ raise_exception('no system') }}", "no_thought", r"model.teacher.view no_thought needs .*\(no system\)"),
        (CHATML.replace("message.content", "message.content.split('</think>')[-1]"), "native", "thought text of a row"),
        (CHATML.replace("in messages", "in messages[1:]"), "no_thought", "system text of a row once"),
        (CHATML.replace("| trim", "| upper"), "native", "view native cannot read a row: the chat template of .* more"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, template: str | None, view: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherView(str(with_template(write_tokenizer(tmp_path), template)), view).check()


def test_wrong_sources_and_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.teacher.source \S+ has no tokenizer.json"):
        TeacherView(str(tmp_path), "native").check()
    with pytest.raises(ValueError, match=r"model.teacher.source \S+absent has no tokenizer that can be loaded"):
        TeacherView(str(tmp_path / "absent"), "native").check()
    with pytest.raises(ValueError, match="model.teacher.view is 'sideways'"):
        TeacherView("x", "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model.teacher.min_aligned is 2"):
        TeacherView("x", "native", 2)


def test_a_row_that_the_template_rewrites_is_a_bad_row(tmp_path: Path, chat: Chat) -> None:
    template = CHATML.replace("| trim", "| replace('ाा', 'ा')")
    view = TeacherView(str(with_template(write_tokenizer(tmp_path), template)), "no_thought")
    assert view.encode(chat, ROW).aligned
    with pytest.raises(ValueError, match="changes more of it than the space around its texts"):
        view.encode(chat, ROW | {"advisory": "पाानी"})


def test_it_travels_to_another_process(views: dict[str, TeacherView], chat: Chat) -> None:
    again = pickle.loads(pickle.dumps(views["native"]))
    assert again == views["native"]
    row = ROW | {"advisory": "</think> का अर्थ"}
    assert again.encode(chat, row) == views["native"].encode(chat, row)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path, folder: Path) -> Any:
    def build(rows: list[dict[str, Any]] | str = "", view: str | None = "native", **options: Any) -> ChatDataModule:
        path = tmp_path / "rows.parquet"
        if rows:
            pq.write_table(pa.Table.from_pylist(rows), path)  # type: ignore[arg-type]
        defaults: dict[str, Any] = {"max_length": 256, "tokens_per_batch": 512, "format": FORMAT, "validation_share": 0}
        data = ChatDataModule(
            train=str(path), tokenizer=str(folder), cache_dir=str(tmp_path / "cache"), **defaults | options
        )
        data.teacher_view = None if view is None else TeacherView(str(folder), view)  # type: ignore[arg-type]
        return data

    return build


def check_batches(data: ChatDataModule, batches: list[dict[str, torch.Tensor]], rows: list[dict[str, Any]]) -> None:
    """Each batch against its rows encoded one by one; over all of them, each row once."""
    view = data.teacher_view
    assert view is not None
    expected = {tuple(data.chat.encode(row).input_ids): view.encode(data.chat, row) for row in rows}
    found = 0
    for batch in batches:
        places, at = batch["teacher_tokens"], batch["teacher_tokens"] >= 0
        read, width = batch["teacher_input_ids"], batch["teacher_input_ids"].shape[1]
        assert (read.flatten()[places[at]] == batch["input_ids"][at]).all()
        assert places.shape == batch["input_ids"].shape
        assert width % 8 == 0
        untaught = np.zeros((2, 5), np.int64)
        starts = {b: (batch["teacher_position_ids"][b] == 0).nonzero().flatten().tolist() for b in range(len(read))}
        for b in range(len(read)):
            for n, i in enumerate(row for row in dict.fromkeys(batch["row_ids"][b].tolist()) if row >= 0):
                own = batch["row_ids"][b] == i
                row = expected[tuple(batch["input_ids"][b][own].tolist())]
                start = starts[b][n]
                size = len(row.input_ids)
                assert read[b, start : start + size].tolist() == row.input_ids
                assert batch["teacher_position_ids"][b, start : start + size].tolist() == list(range(size))
                moved = [t if t < 0 else b * width + start + t for t in row.tokens]
                assert places[b][own].tolist() == moved
                ids, segments = batch["input_ids"][b][own].tolist(), batch["segment_ids"][b][own].tolist()
                untaught += count_targets(ids, segments, data.chat.control_ids, row.tokens)
                found += 1
        assert (places[batch["row_ids"] < 0] == -1).all()
        assert batch["step_targets"].tolist() == untaught.tolist()
    assert found == len(rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_packed_batches_hold_the_teacher_s_rows(make: Any, view: str, streaming: bool) -> None:
    data = make(ROWS, view, streaming=streaming, num_workers=0)
    batches = list(data.train_dataloader())
    assert max(len(batch["input_ids"]) for batch in batches) == 2
    check_batches(data, batches, ROWS)
    encoded = [data.teacher_view.encode(data.chat, row) for row in ROWS]
    assert data.aligned_share == sum(row.aligned for row in encoded) / sum(row.answer for row in encoded)


def test_no_view_adds_nothing(make: Any) -> None:
    data = make(ROWS, None)
    assert not [key for batch in data.train_dataloader() for key in batch if "teacher" in key]
    assert data.aligned_share is None


def test_targets_the_teacher_is_not_asked_for() -> None:
    ids, segments = [9, 1, 2, 9, 3, 4], [1, 2, 3, 3, 4, 4]
    counts = count_targets(ids, segments, frozenset({9}), [-1, 0, -1, -1, 5, -1])
    # target 1 is the teacher's first token, which nothing predicts; 2 and 4 have none; 9 is a control token
    assert counts.tolist() == [[0, 0, 1, 2, 2], [0, 0, 1, 2, 1]]


def test_a_batch_without_rows_has_the_keys_too() -> None:
    nothing = StepTotals(np.zeros((2, 5), np.int64), 0, 0)
    batch = collate([], nothing, 64, 7, teacher=True)
    assert batch["teacher_input_ids"].tolist() == [[7] * 8]
    assert not batch["teacher_position_ids"].any()
    assert batch["teacher_tokens"].tolist() == [[-1] * 8]
    long = PackedRow(0, np.array([1]), np.array([1]), np.arange(70, dtype=np.int32), np.array([69], dtype=np.int32))
    batch = collate([[long, long], [long]], nothing, 64, 7)
    assert batch["teacher_input_ids"].shape == (2, 144)  # the teacher's sequences may be longer than max_length
    assert batch["teacher_tokens"][:, :2].tolist() == [[69, 139], [213, -1]]


def test_a_row_that_aligns_too_little_is_a_bad_row(make: Any, tmp_path: Path) -> None:
    rows = [*ROWS, ROW | {"thought": None, "advisory": "\n" * 80 + "."}]  # the template strips it
    file = str(tmp_path / "rows.parquet")
    reason = "only 2.38% of its answer aligns with the teacher's view, less than model.teacher.min_aligned 0.5"
    with pytest.raises(ValueError, match=re.escape(f"{file} row 40: {reason}")):
        make(rows).setup("fit")
    data = make("", bad_rows="skip")
    with pytest.warns(UserWarning, match=r"1 x aligned by less than model.teacher.min_aligned"):
        data.setup("fit")
    assert data.rejected == [Rejected(file, 40, reason)]
    assert len(data.rows("train")) == 40
    stream = make("", bad_rows="skip", streaming=True)
    with pytest.warns(UserWarning, match="row 40: only 2.38% of its answer"):
        check_batches(stream, list(stream.train_dataloader()), ROWS)
    assert stream.rejected == data.rejected
    lenient = make("")
    lenient.teacher_view = TeacherView(lenient.tokenizer, "native", min_aligned=0)
    assert len(lenient.rows("train")) == 41


def test_each_view_has_its_own_cache(make: Any, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    real = chat_data._encode

    def counted(chat: Any, raw: Any, **options: Any) -> Any:
        encoded.append(raw.number)
        return real(chat, raw, **options)

    monkeypatch.setattr(chat_data, "_encode", counted)
    other = with_template(
        write_tokenizer(tmp_path / "other"), QWEN3.replace("system", "System").replace("'\\n'", "':\\n'")
    )
    for view, source, share, fresh in (
        (None, folder, 0.5, True),
        ("native", folder, 0.5, True),
        ("no_thought", folder, 0.5, True),
        (None, folder, 0.5, False),
        ("native", folder, 0.1, False),
        ("native", other, 0.1, True),
    ):
        encoded.clear()
        data = make(ROWS if not encoded and view is None and fresh else "")
        data.teacher_view = None if view is None else TeacherView(str(source), view, share)  # type: ignore[arg-type]
        data.setup("fit")
        assert bool(encoded) == fresh
        assert ("teacher_ids" in data.rows("train").table.column_names) == (view is not None)


def test_a_module_that_changes_its_view_reads_the_rows_anew(make: Any, folder: Path) -> None:
    data = make(ROWS, None)
    assert "teacher_ids" not in data.rows("train").table.column_names
    data.teacher_view = TeacherView(str(folder), "no_thought")
    check_batches(data, list(data.train_dataloader()), ROWS)


def test_tokenising_in_two_processes(make: Any, tmp_path: Path) -> None:
    files = []
    for i in range(2):
        files.append(str(tmp_path / f"{i}.parquet"))
        pq.write_table(pa.Table.from_pylist(ROWS[i * 20 : i * 20 + 20]), files[-1])
    data = make(num_proc=2)
    data.train = files
    check_batches(data, list(data.train_dataloader()), ROWS)


class Recorder(LightningModule):
    """Keeps the batches that it is given; `teacher_view` is what the data module asks for."""

    def __init__(self, view: TeacherView | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "validation": [], "predict": []}
        if view is not None:
            self.teacher_view = view

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.seen["validation"].append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["predict"] += batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("view", [*VIEWS, None])
def test_the_module_in_training_says_which_view(
    make: Any, tmp_path: Path, folder: Path, view: Any, streaming: bool
) -> None:
    data = make(ROWS, None, streaming=streaming)
    data.validation = data.train
    module = Recorder(None if view is None else TeacherView(str(folder), view))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    if view is None:
        assert not any("teacher_input_ids" in batch for batches in module.seen.values() for batch in batches)
        return
    trainer.predict(module, data)
    assert len(module.seen["predict"]) == 40
    assert "teacher_ids" not in data.rows("test").table.column_names  # nobody is taught there
    data.teacher_view = module.teacher_view
    check_batches(data, module.seen["train"], ROWS)
    check_batches(data, module.seen["validation"], ROWS)


def test_the_share_is_said_once(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = make(ROWS)
        data.setup("fit")
        data.setup("fit")
    said = [record.message for record in caplog.records if "teacher view" in record.message]
    assert said == [f"data.train: teacher view native: {data.aligned_share:.1%} of the answers' tokens align."]


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Iterator[Any]:
    import yaml

    def build(teacher: dict[str, Any], named: bool) -> str:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
        model = {"student": {}, "teacher": teacher}
        data = {"train": str(tmp_path / "rows.parquet"), "tokenizer": str(folder), "cache_dir": str(tmp_path / "cache")}
        section = {"class_path": "agri_moe.models.distill.DistillModule", "init_args": model} if named else model
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": section, "data": data}), "utf-8")
        return str(tmp_path / "config.yaml")

    return build


@pytest.mark.parametrize("named", [False, True])
def test_preview_shows_what_the_teacher_reads(
    config: Any, folder: Path, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    preview(config=config({"source": str(folder), "view": "native", "dtype": "float32"}, named), rows=2)
    said = capsys.readouterr().out
    assert said.count("teacher, native: ") == 2
    assert "\x1b[90m<|im_end|>\n<|im_start|>assistant\n<think>\n" in said
    assert f"\x1b[32m{ROW['advisory'][:-1]}" in said
    assert re.search(r"teacher's view: \d+\.\d% of the answers' tokens align", said)
    preview(config=config({"source": str(folder), "view": "same"}, named), color=False)
    assert "teacher" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs model.teacher.source"):
        preview(config=config({"view": "native"}, named))
