"""Rows to ids and segments: the renderer, the template and the tokenizer agree, and text stays text."""

from __future__ import annotations

import re
import unicodedata
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import NOT_SPECIAL, SPECIAL, real_data, write_tokenizer

from agri_moe.data.chat import Chat, ChatFormat, Segment

S, U, T, A = Segment.SYSTEM, Segment.USER, Segment.THOUGHT, Segment.ASSISTANT
CONTROL = [*SPECIAL, *NOT_SPECIAL, "<|system|>", "<|user|>", "<|thought|>", "<|assistant|>"]
HINDI = "कखगघचछजटडतदनपबमयरलवशसहािीुूेैोौं्ँ़। "
ordinary = st.lists(
    st.one_of(
        st.text(HINDI, max_size=12),
        st.text("abcXYZ 0123.,:;!?'\"(){}%#\\", max_size=12),
        st.sampled_from(
            [
                "\n",
                "\n\n",
                " \n ",
                "\t",
                "\r\n",
                "🌾",
                "👩🏽‍🌾",
                "é",
                "é",
                "\u200d",
                "क़",
                "{{ x }}",
                "{% if %}",
            ]
        ),
    ),
    max_size=8,
).map("".join)
filled = ordinary.map(lambda text: text if text.strip() else text + "अ")
hostile = st.lists(st.one_of(st.sampled_from(CONTROL), filled), min_size=1, max_size=6).map("".join)
maybe = st.one_of(st.none(), st.just(""), st.just(" \n"))
hypothesis = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))


def rows(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    struct = st.dictionaries(st.sampled_from(["फसल", "stage", "लक्षण"]), text, min_size=1)
    return st.fixed_dictionaries(
        {"scenario": st.one_of(text, struct), "advisory": text, "thought": st.one_of(maybe, text)},
        optional={"system": st.one_of(maybe, text)},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat.load(str(folder))


def template_text(chat: Chat, messages: list[dict[str, str]], **options: Any) -> str:
    return str(chat.tokenizer.apply_chat_template(messages, tokenize=False, **options))


def template_ids(chat: Chat, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(chat.tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"])


def test_the_rendered_text_is_exactly_the_documented_one(chat: Chat) -> None:
    row = {"system": "S", "scenario": "C", "thought": "T", "advisory": "A"}
    frame = "<|system|>\nS\n<|user|>\nस्थिति (Scenario):\nC\n"
    assert chat.render(row) == frame + "<|thought|>\nT\n<|assistant|>\nA\n<|endoftext|>"
    for nothing in (None, "", " \n"):
        assert chat.render(row | {"thought": nothing}) == frame + "<|assistant|>\nA\n<|endoftext|>"


@hypothesis
@given(row=rows(hostile))
def test_template_and_renderer_agree_byte_for_byte(chat: Chat, row: dict[str, Any]) -> None:
    assert template_text(chat, chat.messages(row)).encode() == chat.render(row).encode()


@hypothesis
@given(row=rows(filled))
def test_training_ids_are_the_template_s_ids(chat: Chat, row: dict[str, Any]) -> None:
    assert chat.encode(row).input_ids == template_ids(chat, chat.messages(row))


@hypothesis
@given(row=rows(hostile))
def test_text_never_becomes_a_control_token(chat: Chat, row: dict[str, Any]) -> None:
    ids = chat.encode(row).input_ids
    added = set(chat.tokenizer.get_added_vocab().values())
    names = ["system", "user", *(["thought"] if (row["thought"] or "").strip() else []), "assistant", "end"]
    assert [i for i in ids if i in added] == [chat.marker_ids[name] for name in names]
    assert chat.tokenizer.decode(ids) == unicodedata.normalize("NFC", chat.render(row))


@hypothesis
@given(row=rows(filled))
def test_pieces_are_the_same_tokens_and_know_their_characters(chat: Chat, row: dict[str, Any]) -> None:
    ids, segments = chat.encode(row)
    pieces = chat.pieces(row)
    assert [i for piece in pieces for i in (None, *piece.ids)] == [
        None if i in chat.control_ids else i for i in ids[:-1]
    ]
    for piece in pieces:
        held = slice(piece.first, piece.first + len(piece.ids))
        assert ids[held] == piece.ids
        assert {segment for segment, span in zip(segments[held], piece.spans, strict=True) if span[1] > 0} == {
            piece.segment
        }
        assert (piece.spans[0][0], piece.spans[-1][1]) == (-1, len(piece.text) + 1)


@hypothesis
@given(text=hostile, thought=st.booleans())
def test_prompts_are_what_training_saw_and_stay_text(chat: Chat, text: str, thought: bool) -> None:
    prompt = chat.encode_prompt(text, thought=thought)
    row = chat.encode({"scenario": text, "advisory": "A", "thought": "T" if thought else None})
    assert row.input_ids[: len(prompt)] == prompt
    assert {Segment(s) for s in row.segment_ids[: len(prompt)]} == {S, U}
    assert row.segment_ids[len(prompt)] == (T if thought else A)


def test_generation_prompts_of_the_template(chat: Chat) -> None:
    messages = [{"role": "user", "content": "धान पीला है"}]
    text = template_text(chat, messages, add_generation_prompt=True)
    assert text == (f"<|system|>\n{chat.format.default_system}\n<|user|>\nस्थिति (Scenario):\nधान पीला है\n<|thought|>\n")
    assert template_ids(chat, messages, add_generation_prompt=True) == chat.encode_prompt("धान पीला है")
    quick = {"add_generation_prompt": True, "enable_thinking": False}
    assert template_text(chat, messages, **quick).endswith("<|assistant|>\n")
    assert template_ids(chat, messages, **quick) == chat.encode_prompt("धान पीला है", thought=False)
    own = [{"role": "system", "content": "संक्षेप में"}, *messages]
    assert template_ids(chat, own, add_generation_prompt=True) == chat.encode_prompt("धान पीला है", "संक्षेप में")


def test_template_renders_several_turns_and_refuses_other_roles(chat: Chat) -> None:
    turns = [
        {"role": "user", "content": "क"},
        {"role": "assistant", "content": "ख"},
        {"role": "user", "content": "ग"},
        {"role": "assistant", "reasoning_content": "घ", "content": "ङ"},
    ]
    system, header = chat.format.default_system, chat.format.scenario_header
    assert template_text(chat, turns) == (
        f"<|system|>\n{system}\n<|user|>\n{header}\nक\n<|assistant|>\nख\n<|endoftext|>"
        f"<|user|>\n{header}\nग\n<|thought|>\nघ\n<|assistant|>\nङ\n<|endoftext|>"
    )
    with pytest.raises(Exception, match="role tool"):
        template_text(chat, [{"role": "tool", "content": "x"}])


def named(chat: Chat, row: dict[str, Any]) -> list[tuple[Segment, list[str]]]:
    ids, segments = chat.encode(row)
    pairs = zip(segments, chat.tokenizer.convert_ids_to_tokens(ids), strict=True)
    return [(Segment(s), [token for _, token in run]) for s, run in groupby(pairs, key=lambda pair: pair[0])]


def test_exactly_these_tokens_are_supervised(folder: Path) -> None:
    chat = Chat.load(str(folder), ChatFormat(scenario_header="H"))
    row = {"system": "s", "scenario": "a", "thought": "b", "advisory": "c"}
    newline = "Ċ"
    prompt = [newline, "H", newline, "a", newline]
    assert named(chat, row) == [
        (S, ["<|system|>", newline, "s", newline]),
        (U, ["<|user|>", *prompt, "<|thought|>", newline]),
        (T, ["b", newline, "<|assistant|>"]),
        (A, [newline, "c", newline, "<|endoftext|>"]),
    ]
    assert named(chat, row | {"thought": None}) == [
        (S, ["<|system|>", newline, "s", newline]),
        (U, ["<|user|>", *prompt, "<|assistant|>", newline]),
        (A, ["c", newline, "<|endoftext|>"]),
    ]


def test_a_token_across_two_parts_belongs_to_the_later_one(folder: Path) -> None:
    chat = Chat.load(str(folder), ChatFormat(scenario_header="H"))
    runs = named(chat, {"system": "s", "scenario": "a", "thought": "\nb", "advisory": "c"})
    assert runs[1] == (U, ["<|user|>", "Ċ", "H", "Ċ", "a", "Ċ", "<|thought|>"])
    assert runs[2] == (T, ["ĊĊ", "b", "Ċ", "<|assistant|>"])


def test_a_struct_is_rendered_one_field_a_line(chat: Chat) -> None:
    row = {"scenario": {"फसल": "धान", "दिन": 40, "वर्षा": 2.5, "मिट्टी": None, "बुवाई": date(2024, 7, 1)}, "advisory": "A"}
    assert "\nस्थिति (Scenario):\nफसल: धान\nदिन: 40\nवर्षा: 2.5\nबुवाई: 2024-07-01\n<|assistant|>" in chat.render(row)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"advisory": None}, "advisory is missing"),
        ({"advisory": " \n\t"}, "advisory is empty"),
        ({"advisory": 308}, "advisory is a int, not text"),
        ({"scenario": None}, "scenario is missing"),
        ({"scenario": ""}, "scenario is empty"),
        ({"scenario": {"a": None}}, "scenario is empty"),
        ({"scenario": ["a"]}, "scenario is a list, not text"),
        ({"scenario": {"a": {"b": 1}}}, "scenario.a is a dict, not text, a number or a date"),
        ({"thought": 3.5}, "thought is a float, not text"),
        ({"system": b"x"}, "system is a bytes, not text"),
        ({"advisory": "\ud83d"}, "advisory is not valid UTF-8 text"),
    ],
)
def test_rows_that_cannot_be_used(chat: Chat, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        chat.encode({"scenario": "S", "thought": "T", "advisory": "A"} | changes)


@pytest.mark.parametrize("thought", ["पहले सोचें", None])
def test_parse_gives_back_what_was_said(chat: Chat, thought: str | None) -> None:
    row = {"scenario": "क", "thought": thought, "advisory": "पानी दें\n\nफिर </think> देखें"}
    ids = chat.encode(row).input_ids[len(chat.encode_prompt("क", thought=thought is not None)) :]
    said = chat.parse(ids, thought=thought is not None)
    assert said == (thought, row["advisory"], True)
    assert chat.parse([*ids, 5, 6], thought=thought is not None) == said  # what follows the end does not count
    assert not chat.parse(ids[:-1], thought=thought is not None).complete


def test_parse_of_an_answer_cut_off_in_its_thought(chat: Chat) -> None:
    ids = chat.encode_text("सोच")
    assert chat.parse(ids) == ("सोच", "", False)
    assert chat.parse([*ids, chat.end_id]) == ("सोच", "", False)
    assert chat.parse([]) == ("", "", False)


def test_markers_take_new_ids_and_know_their_pieces(folder: Path) -> None:
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(folder)
    chat = Chat.load(str(folder))
    new = [chat.marker_ids[name] for name in ("system", "user", "thought", "assistant")]
    assert new == list(range(len(before), len(before) + 4))
    assert chat.end_id == before.convert_tokens_to_ids("<|endoftext|>") == chat.pad_id
    assert sorted(chat.new_marker_pieces) == new
    for name in ("system", "user", "thought", "assistant"):
        pieces = chat.new_marker_pieces[chat.marker_ids[name]]
        assert max(pieces) < len(before)
        assert chat.tokenizer.decode(pieces) == f"<|{name}|>"
    assert chat.control_ids == {*new, chat.end_id}


def test_saved_tokenizer_serves_the_same_ids(chat: Chat, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = ChatFormat(user="<|किसान|>", default_system='it\'s "so" \\ {{ here }}\nand there', scenario_header="H'")
    first = Chat(AutoTokenizer.from_pretrained(chat.tokenizer.name_or_path), own)
    first.save(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    row = {"scenario": "पत्ती 🌾\nपीली", "thought": "T", "advisory": "A"}
    assert served.eos_token == own.end
    assert served.apply_chat_template(first.messages(row), tokenize=True)["input_ids"] == first.encode(row).input_ids
    assert served.apply_chat_template(first.messages(row)[1:], tokenize=False) == first.render(row)
    again = Chat.load(str(tmp_path))
    assert again.format == own
    assert again.new_marker_pieces == {}
    assert again.encode(row) == first.encode(row)


def test_coloured_text_is_the_text_and_obeys_no_escape(chat: Chat) -> None:
    row = {"scenario": "धान \x1b[31m <|user|>", "thought": "T", "advisory": "A"}
    shown = chat.colored(*chat.encode(row))
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert plain == chat.render(row).replace("\x1b", "␛")
    assert shown.count("\x1b[36;7m") == 2  # the markers <|user|> and <|thought|>, not the text <|user|>


def test_unfit_tokenizers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encodes text after a marker differently.*byte-level BPE"):
        Chat.load(str(write_tokenizer(tmp_path / "metaspace", metaspace=True)))
    with pytest.raises(ValueError, match=r"tokenizer \S*/absent does not exist"):
        Chat.load(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no tokenizer.json"):
        Chat.load(str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"empty cannot be loaded"):
        Chat.load(str(tmp_path / "empty"))


def test_a_marker_that_plain_text_could_spell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="turns the plain text of a into control tokens"):
        Chat.load(str(write_tokenizer(tmp_path)), ChatFormat(user="a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": "<|system|>"}, "two markers are the same"),
        ({"user": ""}, "format.user is ''"),
        ({"end": " x"}, "format.end is ' x'"),
        ({"default_system": " "}, "format.default_system is empty"),
    ],
)
def test_formats_that_make_no_sense(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ChatFormat(**options)


def test_real_rows_with_qwen3_s_tokenizer() -> None:
    import pyarrow.parquet as pq

    data = real_data()
    chat = Chat.load(str(data / "qwen3-0.6b"))
    assert [chat.marker_ids[name] for name in ("system", "user", "thought", "assistant")] == [*range(151669, 151673)]
    assert (chat.end_id, len(chat.tokenizer)) == (151643, 151673)
    names = ("plant_disease_train", "soil_train", "hindi_qa_train")
    real = [row for name in names for row in pq.read_table(data / f"{name}.parquet").slice(0, 200).to_pylist()]
    for row in real:
        text = chat.render(row)
        assert template_text(chat, chat.messages(row)) == text
        assert chat.encode(row).input_ids == chat.tokenizer.encode(text, add_special_tokens=False)
    added = set(chat.tokenizer.get_added_vocab())
    assert not set(chat.encode_text("".join(added))) & set(chat.tokenizer.get_added_vocab().values())
    assert len(real) == 600
