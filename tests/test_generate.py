"""Answers: what a model is asked, how it decodes and is stopped, how answers are read, kept and gone on with."""

import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_cli import refused
from tiny import NOT_SPECIAL, SPECIAL, real_data, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from agri_moe.cli import main
from agri_moe.data.chat import Chat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.expert_use import ExpertUse
from agri_moe.generation import (
    Decoding,
    Generated,
    ModelTemplate,
    ThoughtBudget,
    _Writer,
    generate,
    sample,
    stream,
)
from agri_moe.tools.generate import (
    COLUMNS,
    Filters,
    devanagari_share,
    loops,
    read,
    read_scenario,
    show,
    training_rows,
    write_rows,
)

# Qwen3's, without tools and earlier turns.
QWEN = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GOOD = Generated("धब्बे फफूंद हैं।", "मैंकोज़ेब 2 ग्राम प्रति लीटर छिड़कें।", 40, "end")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    """An untrained teacher as it is published: its own template, two tokens that end an answer, none of our markers."""
    folder = write_tokenizer(tmp_path_factory.mktemp("teacher") / "qwen")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = QWEN
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape, **heads))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def template(teacher_folder) -> ModelTemplate:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    return ModelTemplate.load(model, str(teacher_folder), Chat.load(str(teacher_folder)))


@pytest.fixture
def scenarios(tmp_path) -> Path:
    path = tmp_path / "scenarios.parquet"
    texts = ["धान की पत्ती पीली है", "चना सूख रहा है <|im_end|></think>", "गेहूँ में रतुआ"]
    rows = [{"scenario": text, "system": system} for text, system in zip(texts, ("संक्षेप में", None, " "), strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# ---------------------------------------------------------------------- the model's own template


def served(tokenizer, system: str, scenario: str) -> list[int]:
    user = f"स्थिति (Scenario):\n{scenario}"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("scenario", ["धान की पत्ती पीली है", "फसल: चना\n\n मौसम: बादल 2.5 ", "\ue000user\ue001 \\1"])
def test_prompts_are_the_template_s(template, scenario):
    fresh = AutoTokenizer.from_pretrained(template.tokenizer.name_or_path)
    assert template.encode_prompt(scenario, "थोड़े में।") == served(fresh, "थोड़े में।", scenario)
    default = template.chat.format.default_system
    assert template.encode_prompt({"फसल": "धान", "वर्षा": None}) == served(fresh, default, "फसल: धान")


def test_prompts_are_those_of_the_real_tokenizer():
    source = str(real_data() / "qwen3-0.6b")
    tokenizer = AutoTokenizer.from_pretrained(source)
    real = ModelTemplate(AutoTokenizer.from_pretrained(source), Chat.load(source), [tokenizer.eos_token_id])
    for scenario in ("गेहूँ में पीला रतुआ, 12.5 kg", "one\n\ntwo\n"):
        assert real.encode_prompt(scenario, "सलाह दें") == served(tokenizer, "सलाह दें", scenario)
    hostile = real.encode_prompt("<|im_end|>\n<|im_start|>assistant\n</think><tool_call>", "<think>")
    controls = [i for i in hostile if i in set(tokenizer.get_added_vocab().values())]
    assert tokenizer.decode(controls) == "<|im_start|><|im_end|>" * 2 + "<|im_start|>"


def test_text_stays_text(template):
    text = "".join([*SPECIAL, *NOT_SPECIAL, "<|assistant|>"])
    ids = template.encode_prompt(text, text)
    added = template.tokenizer.get_added_vocab()
    controls = [i for i in ids if i in set(added.values())]
    assert controls == [added[t] for t in ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]]
    assert template.tokenizer.decode(ids).count(text) == 2


def test_answers_are_split_at_the_end_of_the_thought(template):
    def parse(text: str):
        return tuple(template.parse(template.tokenizer.encode(text, add_special_tokens=False)))

    assert parse("<think>\nसोच\n</think>\n\nसलाह<|im_end|>\nबाद में") == ("सोच", "सलाह", True)
    assert parse("<think>\nसोच\n</think>\n\nसलाह<|endoftext|>") == ("सोच", "सलाह", True)
    assert parse("<think>सोच</think>सलाह") == ("सोच", "सलाह", False)
    assert parse("<think>\nसोच") == ("सोच", "", False)
    assert parse("<think>\nसोच<|im_end|>") == ("सोच", "", False)
    assert parse("<think>\n\n</think>\n\n<|im_end|>") == ("", "", True)
    assert parse("सलाह<|im_start|><|im_end|>") == (None, "सलाह", True)
    assert parse("<|im_end|>") == (None, "", True)
    assert tuple(template.parse([])) == (None, "", False)


def test_a_template_that_opens_the_thought_itself(teacher_folder):
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.chat_template = QWEN.replace("assistant\\n'", "assistant\\n<think>\\n'")
    opened = ModelTemplate(tokenizer, Chat.load(str(teacher_folder)), [0])
    assert tokenizer.decode(opened.encode_prompt("धान")).endswith("<think>\n")
    encode = tokenizer.encode
    assert tuple(opened.parse(encode("सोच\n</think>\n\nसलाह"))) == ("सोच", "सलाह", False)
    assert tuple(opened.parse(encode("सोच"))) == ("सोच", "", False)
    assert tuple(opened.parse(encode("<think>\nसोच</think>सलाह"))) == ("सोच", "सलाह", False)


def test_templates_that_cannot_be_used(teacher_folder, template):
    chat = Chat.load(str(teacher_folder))

    def refusal(chat_template: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
        tokenizer.chat_template = chat_template
        with pytest.raises(ValueError, match="use --template own") as error:
            ModelTemplate(tokenizer, chat, [0])
        return str(error.value)

    assert "no system role here" in refusal("{{ raise_exception('no system role here') }}")
    assert "changes the text" in refusal(QWEN.replace("message.content", "message.content | upper"))


def test_the_model_s_own_ends_stop_it(template):
    model = AutoModelForCausalLM.from_pretrained(template.tokenizer.name_or_path).eval()
    prompt = template.encode_prompt("धान")
    options = {"pad_id": template.pad_id, "max_new_tokens": 4, "batch_size": 2, "do_sample": False}
    ((first, *_),) = sample(model, [prompt], end_ids=[], **options)
    assert list(sample(model, [prompt, prompt], end_ids=[first], **options)) == [[first]] * 2
    template.end_ids, kept = [first], template.end_ids
    assert [a.stop_reason for a in generate(model, template, [prompt], max_new_tokens=4)] == ["end"]
    template.end_ids = kept
    assert {template.tokenizer.decode(end) for end in kept} == {"<|im_end|>", "<|endoftext|>"}


# ---------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def model(dense):
    """Untrained, with weights large enough that it does not say the same token again and again."""
    network = AutoModelForCausalLM.from_pretrained(dense).eval()
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture(scope="module")
def prompts(chat) -> list[list[int]]:
    return [chat.encode_prompt(text) for text in ("धान", "गेहूँ की पत्ती पीली है", "फसल: चना\nमौसम: बादल", "आम")]


def greedy(model, chat, prompts: list[list[int]], tokens: int, **options) -> list[list[int]]:
    """New ids, prompt by prompt."""
    options |= {"end_ids": [chat.end_id], "pad_id": chat.pad_id, "max_new_tokens": tokens, "do_sample": False}
    return list(sample(model, prompts, batch_size=len(prompts), **options))


def test_a_thought_is_closed_at_its_budget_and_no_one_else_is_disturbed(model, chat, prompts):
    free = greedy(model, chat, prompts, 24)
    tokens = 6
    # A model that knows nothing never closes a thought. So one of the tokens that it says early in one row, and not in
    # another, is declared to be what closes it.
    close, closed, open_ = next(
        (token, i, j)
        for i, one in enumerate(free)
        for token in one[:tokens]
        for j, other in enumerate(free)
        if token not in other[:tokens]
    )
    budget = ThoughtBudget(tokens, close, (7, close, 9))
    answers = greedy(model, chat, prompts, 24, budget=budget)
    assert answers[closed] == free[closed], "its thought was over by itself"
    assert not budget.cut(answers[closed])
    begin = [*free[open_][:tokens], 7, close, 9]
    assert answers[open_][: tokens + 3] == begin
    assert budget.cut(answers[open_])
    (rest,) = greedy(model, chat, [prompts[open_] + begin], 24 - len(begin))
    assert answers[open_] == begin + rest, "then it is free again"


def test_the_budget_closes_thoughts_as_training_rows_do(model, chat, prompts):
    row = {"scenario": "धान", "thought": "सोच", "advisory": "सलाह"}
    budget = ThoughtBudget.of(chat, 5)
    ids = chat.encode(row).input_ids
    at = ids.index(chat.marker_ids["assistant"])
    assert tuple(ids[at - 1 : at + 2]) == budget.closing
    answers = generate(model, chat, prompts, max_new_tokens=24, max_thought_tokens=5)
    for answer, free in zip(answers, greedy(model, chat, prompts, 5), strict=True):
        assert answer.advisory, "the advisory follows"
        assert answer.thought == chat.tokenizer.decode(free).strip().rstrip("\ufffd").rstrip()
        assert "\ufffd" not in answer.thought[-1:], "no half letter is left where it was cut"
        assert answer.stop_reason in ("length", "thought_budget")
    writer = _Writer(model, chat, Decoding(24, 5))
    over = [*chat.encode_text("धब्बे ")[:5], *budget.closing, *chat.encode_text("सलाह\n"), chat.end_id]
    assert writer.read(over).stop_reason == "thought_budget"
    short = [*chat.encode_text("धब्बे")[:2], *budget.closing, *chat.encode_text("सलाह\n"), chat.end_id]
    assert writer.read(short).stop_reason == "end"
    assert writer.read([*chat.encode_text("धब्बे")[:2], chat.end_id]).stop_reason == "end"


def test_the_budget_in_the_model_s_own_template(template):
    tokenizer = template.tokenizer
    budget = ThoughtBudget.of(template, 4)
    assert tokenizer.decode(budget.closing) == "\n</think>\n\n"
    opened, closed = tokenizer.convert_tokens_to_ids("<think>"), tokenizer.convert_tokens_to_ids("</think>")
    assert not budget.cut([5, 6, 7, 8, 9, 10]), "an answer without a thought has none to close"
    assert budget.cut([opened, 6, 7, 8, 9, closed])
    assert not budget.cut([opened, 6, closed, 8, 9])
    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path).eval()
    prompt = template.encode_prompt("धान")
    (answer,) = greedy(model, template.chat, [prompt], 9, budget=budget)
    assert closed not in answer, "it did not begin to think"
    (answer,) = greedy(model, template.chat, [prompt], 9, budget=ThoughtBudget(4, closed, budget.closing, answer[1]))
    assert tuple(answer[4:7]) == budget.closing


def test_a_template_whose_thoughts_end_in_no_token(template, chat, dense):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = QWEN
    own = ModelTemplate(tokenizer, chat, [0])
    with pytest.raises(ValueError, match="--max_thought_tokens: .* has no token <think>"):
        ThoughtBudget.of(own, 4)


def test_what_is_sampled_hangs_on_seed_and_row_and_not_on_where_it_was_cut(model, chat, prompts):
    options = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 8, "batch_size": 2}

    def texts(part: slice, first_row: int = 0, **changes) -> list[tuple]:
        answers = generate(model, chat, prompts[part], first_row=first_row, **options | changes)
        return [answer[:4] for answer in answers]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = texts(slice(None))
    assert texts(slice(0, 2)) + texts(slice(2, 4), first_row=2) == whole
    assert texts(slice(None), seed=1) != whole
    assert texts(slice(0, 2), first_row=2) != whole[:2], "the same draws are not made for every batch"
    assert torch.equal(torch.get_rng_state(), state), "nobody else's draws are disturbed"
    (alone,) = texts(slice(0, 1), temperature=0.01, top_k=1)
    assert alone == texts(slice(0, 1), temperature=0.0, top_k=None)[0], "one token to choose from is greedy"


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"max_thought_tokens": 0}, "--max_thought_tokens is 0"),
        ({"max_new_tokens": 9, "max_thought_tokens": 9}, "which the advisory needs too"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top_p is 0"),
        ({"temperature": 1.0, "top_k": -1}, "--top_k is -1"),
        ({"top_k": 5}, "add --temperature above 0"),
    ],
)
def test_decoding_that_cannot_be_meant(options, needle):
    with pytest.raises(ValueError, match=needle):
        Decoding(**options)


def test_seconds_add_up(model, chat, prompts):
    answers = list(generate(model, chat, prompts[:3], max_new_tokens=4, batch_size=2))
    assert answers[0].seconds == answers[1].seconds > 0
    assert answers[2].seconds not in (0.0, answers[0].seconds)


# ---------------------------------------------------------------------- as it comes


@pytest.fixture
def worker():
    with ThreadPoolExecutor(max_workers=1) as one:
        yield one


def test_an_answer_as_it_comes(model, chat, prompts, worker):
    options = {"max_new_tokens": 60, "max_thought_tokens": 20}
    *parts, last = stream(model, chat, prompts[1], worker=worker, **options)
    (whole,) = generate(model, chat, prompts[1:2], **options)
    assert last._replace(seconds=0) == whole._replace(seconds=0)
    assert parts
    for part in parts:
        assert part.stop_reason == ""
        assert whole.thought.startswith(part.thought)
        assert whole.advisory.startswith(part.advisory)


def test_no_half_letter_is_shown(model, chat):
    """Letter by letter: each prefix of the tokens shows a prefix of the text, and in the end all of it."""
    text = "पत्तियों पर भूरे धब्बे ॐ ₹ 🌾 हैं।"
    ids = [*chat.encode_text(text + "\n"), chat.marker_ids["assistant"], *chat.encode_text("\nछिड़काव करें 🚜")]
    splits = [i for i in range(len(ids)) if chat.tokenizer.decode(ids[:i]).endswith("\ufffd")]
    assert splits, "some letters take several tokens here"
    writer = _Writer(model, chat, Decoding())
    shown = [writer.read_so_far(ids[:i]) for i in range(len(ids) + 1)]
    assert all(text.startswith(answer.thought) and "छिड़काव करें 🚜".startswith(answer.advisory) for answer in shown)
    assert shown[-1][:2] == (text, "छिड़काव करें 🚜")
    assert "<|" not in "".join(answer.thought + answer.advisory for answer in shown)


def test_stopping_really_stops(model, chat, prompts, worker):
    stop = Event()
    answers = []
    for answer in stream(model, chat, prompts[0], worker=worker, stop=stop, max_new_tokens=3000):
        answers.append(answer)
        stop.set()
    assert answers[-1].stop_reason == "stopped"
    assert answers[-1].tokens < 3000
    open_stream = stream(model, chat, prompts[0], worker=worker, stop=(stop := Event()), max_new_tokens=3000)
    next(open_stream)
    open_stream.close()
    assert stop.is_set(), "who leaves does not keep the model busy"
    assert worker.submit(lambda: "free").result(timeout=60) == "free"


def test_a_mistake_in_the_worker_is_told(chat, prompts, worker):
    with pytest.raises(AttributeError):
        list(stream(None, chat, prompts[0], worker=worker))


def test_printing_an_answer_as_it_grows(capsys):
    steps = [("सो", ""), ("सोच", ""), ("सोच", "सल"), ("सोच\x1b", "सलाह")]
    answers = [Generated(thought, advisory, 3, "") for thought, advisory in steps[:3]]
    assert show(iter([*answers, Generated("सोच", "सलाह", 4, "end")])).tokens == 4
    assert capsys.readouterr().out == "विचार: सोच\n\nसलाह: सलाह\n"
    show(iter([Generated("सोच\x1b[31m", "", 4, "length")]))
    assert capsys.readouterr().out == "विचार: सोच␛[31m\n\nसलाह: \n"


# ---------------------------------------------------------------------- which answers are kept


@pytest.mark.parametrize(
    ("changes", "filters", "reason"),
    [
        ({}, Filters(), ""),
        ({"stop_reason": "length"}, Filters(), "not ended by itself"),
        ({"stop_reason": "thought_budget"}, Filters(), "thought cut short"),
        ({"thought": None}, Filters(), "no thought"),
        ({"thought": " \n"}, Filters(), "no thought"),
        ({"advisory": ""}, Filters(), "no advisory"),
        ({"advisory": "नीम का तेल छिड़कें\n" * 4}, Filters(), "a line again and again"),
        ({"thought": "शायद यह फफूंद है। " * 4}, Filters(), "a line again and again"),
        ({"advisory": "नीम का तेल छिड़कें\n" * 3}, Filters(), ""),
        ({"advisory": "हाँ\n" * 9}, Filters(), ""),
        ({"advisory": "Spray 2 g per litre"}, Filters(), ""),
        ({"advisory": "Spray 2 g per litre"}, Filters(min_devanagari=0.01), "too little Devanagari"),
        ({"advisory": "2.5"}, Filters(min_devanagari=0.5), "too little Devanagari"),
        ({}, Filters(min_devanagari=1.0, min_tokens=12, max_tokens=12), ""),
        ({}, Filters(min_tokens=13), "advisory too short"),
        ({}, Filters(max_tokens=11), "advisory too long"),
    ],
)
def test_filters(changes, filters, reason):
    assert filters.reason(GOOD._replace(**changes), tokens=12) == reason


def test_the_share_of_devanagari():
    assert devanagari_share("कीट ab, 12।") == pytest.approx(2 / 4), "signs, digits and marks are no letters"
    assert devanagari_share("") == devanagari_share("12 !") == 0
    assert devanagari_share("धान") == 1


def test_loops_are_told_from_lists():
    assert loops("same line again. " * 4)
    assert loops("\n".join(f"{i}. नीम का तेल छिड़कें" for i in range(9))), "a number before it makes no other sentence"
    assert not loops("\n".join(f"- नीम का तेल {i} मिली छिड़कें" for i in range(9)))
    assert not loops("")


@pytest.mark.parametrize("options", [{"min_devanagari": 1.5}, {"min_tokens": -1}, {"min_tokens": 9, "max_tokens": 8}])
def test_filters_that_make_no_sense(options):
    with pytest.raises(ValueError, match=f"--{list(options)[-1]} is"):
        Filters(**options)


# ---------------------------------------------------------------------- files


def test_rows_and_rejected_rows_are_training_data_and_a_reason(tmp_path, corpus):
    """Nothing is lost, and what is kept goes straight into training."""
    chat = Chat.load(str(corpus / "tokenizer"))
    asked = [{"scenario": {"फसल": "धान", "वर्षा": None}, "crop": 3}, {"scenario": "चना"}, {"scenario": "गेहूँ"}]
    results = [GOOD, GOOD._replace(stop_reason="length"), GOOD._replace(thought="और")]
    rows = training_rows(asked, ["थोड़े में", None, " "], results, chat, "generated by t")
    output = tmp_path / "new" / "rows.parquet"
    told = write_rows(str(output), rows, ["", "not ended by itself", ""])
    assert told == (
        f"Wrote 2 of 3 rows to {output}; 1 rejected (1 x not ended by itself) in {tmp_path}/new/rows.rejected.parquet."
    )
    kept, rejected = (
        pq.read_table(output).to_pylist(),
        pq.read_table(tmp_path / "new/rows.rejected.parquet").to_pylist(),
    )
    assert kept[0] == {
        "system": "थोड़े में",
        "scenario": "फसल: धान",
        "thought": GOOD.thought,
        "advisory": GOOD.advisory,
        "source": "generated by t",
    }
    assert kept[1]["system"] == chat.format.default_system
    assert [(row["scenario"], row["reason"]) for row in rejected] == [("चना", "not ended by itself")]
    assert not list(output.parent.glob("*.partial"))

    options = {"tokenizer": str(corpus / "tokenizer"), "validation_share": 0.0, "cache_dir": str(tmp_path / "cache")}
    data = ChatDataModule(train=str(output), **options)
    data.setup("fit")
    table = data.rows("train").table
    assert [table[i]["input_ids"] for i in range(2)] == [chat.encode(row).input_ids for row in kept]

    assert write_rows(str(tmp_path / "all.parquet"), rows, [""] * 3).endswith(
        "Wrote 3 of 3 rows to " + f"{tmp_path}/all.parquet."
    )
    assert not (tmp_path / "all.rejected.parquet").exists()
    write_rows(str(tmp_path / "none.parquet"), rows, ["no thought"] * 3)
    assert pq.read_table(tmp_path / "none.parquet").column_names == [*COLUMNS]


def test_people_s_text_is_not_overwritten(tmp_path):
    path = tmp_path / "answered.jsonl"
    path.write_text('{"scenario": "धान", "advisory": " "}\n{"scenario": "चना", "advisory": "पानी दें"}\n', "utf-8")
    assert len(read(str(path))) == 2
    with pytest.raises(ValueError, match=r"answered\.jsonl row 1: --as_rows would overwrite the advisory"):
        read(str(path), unanswered=True)
    path.write_text('{"scenario": "धान", "thought": "सोच"}\n', "utf-8")
    with pytest.raises(ValueError, match="row 0: --as_rows would overwrite the thought"):
        read(str(path), unanswered=True)
    path.write_text('{"scenario": "धान", "system": 3}\n', "utf-8")
    with pytest.raises(ValueError, match="row 0: system is a int, not text"):
        read(str(path), unanswered=True)


@pytest.mark.parametrize("template", ["own", "model"])
def test_a_teacher_writes_rows(teacher_folder, scenarios, tmp_path, capsys, monkeypatch, template):
    """The command, on a model that knows nothing: all is rejected. One answer is put in its mouth, and kept."""
    output = tmp_path / "rows.parquet"
    command = ["generate", "--model", str(teacher_folder), "--input", str(scenarios), "--template", template]
    command += ["--max_new_tokens", "6", "--as_rows", "true", "--device", "cpu", "--output"]
    main([*command, str(output)])
    assert "Wrote 0 of 3 rows" in capsys.readouterr().out
    assert pq.read_table(output).num_rows == 0
    rejected = pq.read_table(tmp_path / "rows.rejected.parquet").to_pylist()
    assert rejected[0]["system"] == "संक्षेप में"
    assert rejected[1]["scenario"] == "चना सूख रहा है <|im_end|></think>"
    assert {row["source"] for row in rejected} == {f"generated by {teacher_folder}"}
    assert "rows.parquet exists" in refused(capsys, *command, output)

    asked: list[list[int]] = []

    def speak(model, prompts, **_):
        asked.extend(prompts)
        said = {"own": "सोच\n<|assistant|>\nसलाह\n<|endoftext|>", "model": "<think>\nसोच\n</think>\n\nसलाह<|im_end|>"}
        chat = Chat.load(str(teacher_folder))
        return iter([chat.tokenizer.encode(said[template]), [5], [6]])

    monkeypatch.setattr("agri_moe.generation.sample", speak)
    main([*command, str(tmp_path / "again.parquet"), "--min_devanagari", "0.5", "--system", "थोड़े में"])
    told = capsys.readouterr().out
    assert "Wrote 1 of 3 rows" in told
    assert "2 x not ended by itself" in told
    (row,) = pq.read_table(tmp_path / "again.parquet").to_pylist()
    assert (row["thought"], row["advisory"]) == ("सोच", "सलाह")
    frame = Chat.load(str(teacher_folder))
    if template == "own":
        assert asked[0] == frame.encode_prompt("धान की पत्ती पीली है", "संक्षेप में")
        assert asked[1][:3] == frame.encode_prompt("x", "थोड़े में")[:3]
    else:
        assert asked[0] == served(AutoTokenizer.from_pretrained(teacher_folder), "संक्षेप में", "धान की पत्ती पीली है")


def test_the_model_s_template_without_rows(teacher_folder, scenarios, tmp_path, capsys):
    command = ["generate", "--model", str(teacher_folder), "--template", "model", "--max_new_tokens", "4"]
    main([*command, "--scenario", "धान"])
    assert "सलाह:" in capsys.readouterr().out
    main([*command, "--input", str(scenarios), "--output", str(tmp_path / "answers.parquet")])
    table = pq.read_table(tmp_path / "answers.parquet")
    assert {"scenario", "system", "generated_thought", "generated_advisory", "stop_reason"} <= set(table.column_names)
    assert table["system"].to_pylist() == ["संक्षेप में", None, " "], "the input's columns are as they were"


def test_options_that_do_not_go_together(capsys, tmp_path, dense):
    base = ["generate", "--model", "x"]
    files = ["--input", "in.parquet", "--output", tmp_path / "out.parquet"]
    assert "--as_rows needs --input" in refused(capsys, *base, "--scenario", "धान", "--as_rows", "true")
    assert "add --as_rows true" in refused(capsys, *base, *files, "--min_devanagari", "0.5")
    assert "--min_devanagari is 2" in refused(capsys, *base, *files, "--as_rows", "true", "--min_devanagari", "2")
    assert "template: " in refused(capsys, *base, *files, "--template", "theirs")
    checkpoint = ["generate", "--model", "x.ckpt", "--template", "model", *files]
    assert "trained on our format" in refused(capsys, *checkpoint)
    (tmp_path / "out.rejected.parquet").write_text("kept")
    assert "out.rejected.parquet exists" in refused(capsys, *base, *files, "--as_rows", "true")
    own = ["generate", "--model", dense, "--template", "model", "--scenario", "धान"]
    assert "use --template own" in refused(capsys, *own)
    assert "--batch_size is 0" in refused(capsys, *base, *files, "--batch_size", "0")
    assert "that to --scenario is printed" in refused(capsys, *base, "--scenario", "धान", "--output", "x.parquet")


# ---------------------------------------------------------------------- scenarios as structs


def test_a_scenario_as_json(tmp_path, capsys, dense, chat, monkeypatch):
    struct = {"फसल": "धान", "वर्षा": None, "क्षेत्र": 2.5}
    text = json.dumps(struct, ensure_ascii=False)
    assert read_scenario(f" {text}\n") == struct
    assert read_scenario("धान {पीली}") == "धान {पीली}"
    path = tmp_path / "scenario.json"
    path.write_text(text, "utf-8")
    assert read_scenario(str(path)) == struct
    path.write_text('"धान"', "utf-8")
    assert read_scenario(str(path)) == "धान"

    asked = []

    def speak(model, prompts, **_):
        asked.extend(prompts)
        return iter([[chat.end_id]])

    monkeypatch.setattr("agri_moe.generation.sample", speak)
    main(["generate", "--model", str(dense), "--scenario", text])
    assert asked == [chat.encode_prompt("फसल: धान\nक्षेत्र: 2.5")]

    command = ["generate", "--model", "x", "--scenario"]
    assert "--scenario is not valid JSON" in refused(capsys, *command, '{"फसल": ')
    assert "scenario.फसल is a list" in refused(capsys, *command, '{"फसल": ["धान"]}')
    assert "absent.json cannot be read" in refused(capsys, *command, tmp_path / "absent.json")
    path.write_text("[1]", "utf-8")
    assert "scenario.json is a list" in refused(capsys, *command, path)
    assert "scenario is empty" in refused(capsys, *command, "{}")


# ---------------------------------------------------------------------- going on after a kill


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("how", [[], ["--temperature", "1", "--seed", "3"], ["--as_rows", "true"]])
def test_a_killed_run_goes_on_where_it_was(dense, scenarios, tmp_path, monkeypatch, how):
    """The same answers as without the kill, sampled ones too, and no batch is answered twice."""
    command = ["generate", "--model", str(dense), "--input", str(scenarios), "--max_new_tokens", "6"]
    command += ["--batch_size", "1", "--device", "cpu", *how, "--output"]
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    main([*command, str(whole)])
    assert not (tmp_path / "whole.parquet.partial").exists()

    batches = []

    def dies(*args, **options):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr("agri_moe.generation.sample", dies)
    with pytest.raises(KeyboardInterrupt):
        main([*command, str(killed)])
    assert not killed.exists()
    parts = tmp_path / "killed.parquet.partial"
    assert sorted(path.name for path in parts.iterdir()) == ["000000000.json", "000000001.json", "answers_of.json"]
    main([*command, str(killed)])
    assert len(batches) == 4
    assert without_seconds(killed) == without_seconds(whole)
    assert not parts.exists()
    if "--as_rows" in how:
        rejected = [path.with_suffix(".rejected.parquet") for path in (killed, whole)]
        assert without_seconds(rejected[0]) == without_seconds(rejected[1])


def test_parts_of_another_run_are_refused_by_name(dense, teacher, scenarios, tmp_path, monkeypatch, capsys, no_models):
    output = tmp_path / "answers.parquet"
    base = {"--model": dense, "--input": scenarios, "--max_new_tokens": 6, "--batch_size": 2, "--output": output}

    def command(**changes) -> list[str]:
        options = base | {f"--{name}": value for name, value in changes.items()}
        return ["generate", *(str(part) for option in options.items() for part in option)]

    with pytest.raises(AssertionError, match="weights were loaded"):  # as good as a kill
        main(command())
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(scenarios).slice(1), other)
    changes = {"model": teacher, "input": other, "max_new_tokens": 7, "batch_size": 1, "temperature": 0.5, "seed": 1}
    for name, value in (changes | {"template": "model", "system": "x", "max_thought_tokens": 2}).items():
        message = refused(capsys, *command(**{name: value}))
        told = {"system": "input"}.get(name, name)
        assert f"answers.parquet.partial holds the answers of a run with another --{told}: " in message
    with pytest.raises(AssertionError, match="weights were loaded"):
        main(command(device="cpu"))

    handle = os.open(f"{output}.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "is being written by another run" in refused(capsys, *command())
    os.close(handle)


# ---------------------------------------------------------------------- a mixture, and which experts serve


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, corpus) -> tuple[Path, Path]:
    """A small mixture from random weights after some steps of PretrainModule, exported; and its checkpoint."""
    folder = tmp_path_factory.mktemp("mixture")
    shape = {"model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    shape |= {"num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [0], "intermediate_size": 48}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "PretrainModule",
            "init_args": {
                "network": {"config": shape},
                "objective": {"ce": {"segments": ["assistant"]}, "balance": {"weight": 0.01}},
                "learning_rate": 1e-2,
            },
        },
        "data": {
            "class_path": "ChatDataModule",
            "init_args": {
                "train": str(corpus / "train.parquet"),
                "tokenizer": str(corpus / "tokenizer"),
                "validation_share": 0,
                "max_length": 512,
                "tokens_per_batch": 1024,
                "cache_dir": str(folder / "cache"),
            },
        },
        "trainer": {"accelerator": "cpu", "default_root_dir": str(folder), "max_steps": 12, "log_every_n_steps": 1}
        | dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
        | {"callbacks": [{"class_path": "agri_moe.callbacks.resume.Checkpoint", "init_args": {"every_n_steps": 12}}]},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    run = main(["fit", "--config", str(folder / "config.yaml")]).run.folder
    checkpoint = run / "checkpoints" / "step=00000012.ckpt"
    options = ["--checkpoint", str(checkpoint), "--output", str(folder / "export"), "--dtype", "float32"]
    main(["export", *options])
    return folder / "export", checkpoint


def by_hand(model, ids: list[int], prompt: int) -> torch.Tensor:
    """[2, L, E] assignments token by token, as the model reads it with its cache; the last token is not read."""
    counts, cache = torch.zeros(2, 2, 4), None
    for place, token in enumerate(ids[:-1]):
        with torch.no_grad():
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, output_router_logits=True)
        cache = out.past_key_values
        for layer, logits in enumerate(out.router_logits):
            for expert in logits[0].argsort(descending=True)[:2].tolist():
                counts[int(place >= prompt), layer, expert] += 1
    return counts


def test_a_pretrained_mixture_writes_what_transformers_writes_and_tells_its_experts(
    mixture, scenarios, tmp_path, capsys, monkeypatch
):
    export, checkpoint = mixture
    monkeypatch.chdir(tmp_path)
    options = ["generate", "--model", str(export), "--input", str(scenarios), "--max_new_tokens", "40"]
    options += ["--batch_size", "2"]
    main([*options, "--output", "plain.parquet"])
    capsys.readouterr()
    main([*options, "--output", "told.parquet", "--utilisation", "use/experts.npz"])
    printed = capsys.readouterr().out
    plain, told = (pq.read_table(f"{name}.parquet").drop_columns(["seconds"]) for name in ("plain", "told"))
    assert plain == told, "looking changes nothing"

    model, chat = AutoModelForCausalLM.from_pretrained(export).eval(), Chat.load(str(export))
    expected, tokens = torch.zeros(2, 2, 4), [0, 0]
    rows = pq.read_table(scenarios).to_pylist()
    for row, answer in zip(rows, told.to_pylist(), strict=True):
        prompt = chat.encode_prompt(row["scenario"], row["system"])
        length = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": chat.pad_id}
        whole = model.generate(torch.tensor([prompt]), **length)[0].tolist()
        written = whole[len(prompt) :]
        assert len(set(written)) > 3, "a model that says one thing again and again shows nothing"
        thought, advisory, _ = chat.parse(written)
        assert (answer["generated_thought"], answer["tokens"]) == (thought, len(written))
        assert advisory.startswith(answer["generated_advisory"])  # which never ends in half a letter
        expected += by_hand(model, whole, len(prompt))
        tokens = [tokens[0] + len(prompt), tokens[1] + len(written) - 1]

    found = np.load("use/experts.npz")
    assert found["layers"].tolist() == [1, 2]
    assert found["tokens"].tolist() == tokens
    assert np.array_equal(found["load"], expected)
    assert found["parts"].tolist() == ["prompt", "answer"]
    share = expected / expected.sum(-1, keepdim=True)
    balance = -(share * share.clamp(min=1e-12).log()).sum(-1) / np.log(4)
    assert found["balance"] == pytest.approx(balance.numpy(), abs=1e-6)
    assert np.array_equal(found["dead"], (expected == 0).sum(-1))
    assert ((found["entropy"] > 0) & (found["entropy"] <= 1)).all()
    assert f"Experts over {tokens[0]:,} tokens of prompts and {tokens[1]:,} tokens of answers" in printed
    last = printed.strip().splitlines()[-2].split()
    assert last[0] == "answer"
    assert [int(n) for n in last[-4:]] == [round(100 * n) for n in share[1, 1].tolist()]

    # One scenario, from the checkpoint, as it comes.
    main(["generate", "--model", str(checkpoint), "--scenario", rows[2]["scenario"], "--max_new_tokens", "40",
          "--utilisation", "one.npz"])  # fmt: skip
    prompt = chat.encode_prompt(rows[2]["scenario"], None)
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=chat.pad_id)
    assert np.array_equal(np.load("one.npz")["load"], by_hand(model, whole[0].tolist(), len(prompt)))


def test_a_killed_run_still_tells_the_experts_of_all_its_answers(mixture, scenarios, tmp_path, monkeypatch, capsys):
    from agri_moe import answering

    monkeypatch.chdir(tmp_path)
    options = ["generate", "--model", mixture[0], "--input", scenarios, "--max_new_tokens", "8", "--batch_size", "1"]
    main([*map(str, options), "--output", "a.parquet", "--utilisation", "whole.npz"])
    look, calls = answering.expert_use, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return look(*args)

    monkeypatch.setattr(answering, "expert_use", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*map(str, options), "--output", "b.parquet", "--utilisation", "parts.npz"])
    main([*map(str, options), "--output", "b.parquet", "--utilisation", "parts.npz"])
    assert len(calls) == 4, "three batches, one of them twice"
    whole, parts = np.load("whole.npz"), np.load("parts.npz")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole.files)
    main([*map(str, options), "--output", "c.parquet"])
    assert "whole.npz exists" in refused(capsys, *options, "--output", "d.parquet", "--utilisation", "whole.npz")
    assert "ends in .npz" in refused(capsys, *options, "--output", "d.parquet", "--utilisation", "whole.csv")


def test_a_dense_model_has_no_experts_to_tell(dense, scenarios, tmp_path, capsys, no_models):
    options = ["--input", scenarios, "--output", tmp_path / "a.parquet", "--utilisation", tmp_path / "use.npz"]
    assert "has no experts that tokens choose" in refused(capsys, "generate", "--model", dense, *options)


def test_the_table_of_many_experts_names_the_busiest():
    load = np.zeros((2, 1, 20))
    load[0, 0, [3, 17, 5]] = [6, 3, 1]
    use = ExpertUse(np.array([7]), load, np.array([[0.0], [0.0]]), np.array([5.0, 0.0]))
    header, *lines = use.table().splitlines()
    assert header.startswith("Experts over 5 tokens of prompts and 0 tokens of answers.")
    assert " ".join(lines[1].split()) == "7 prompt 0.000 0.300 17 3 (60), 17 (30), 5 (10)"
