"""A teacher writes rows: what it is asked, how its answers are read, which of them are kept, and where."""

from pathlib import Path

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
from agri_moe.generation import Generated, ModelTemplate, generate, sample
from agri_moe.tools.generate import COLUMNS, Filters, devanagari_share, loops, read, training_rows, write_rows

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


# ---------------------------------------------------------------------- which answers are kept


@pytest.mark.parametrize(
    ("changes", "filters", "reason"),
    [
        ({}, Filters(), ""),
        ({"stop_reason": "length"}, Filters(), "not ended by itself"),
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
