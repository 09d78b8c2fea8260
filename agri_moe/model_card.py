"""The README.md of an exported model, as the hub reads it: nothing stands there that the run did not leave behind.

Front matter: https://huggingface.co/docs/hub/model-cards. Sections follow Mitchell et al. 2019, "Model Cards for Model
Reporting" (arXiv 1810.03993): use, training, evaluation, limits.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from agri_moe.data.chat import Chat
from agri_moe.data.synthetic import NOTICE
from agri_moe.reporting import Curve, Record, Row, done, evaluation, facts, introduction, tested
from agri_moe.tools.generate import devanagari_share

NO_SUBSTITUTE = (
    "यह मॉडल कृषि विशेषज्ञ का विकल्प नहीं है: दवा, मात्रा और समय की जाँच कृषि विज्ञान केंद्र से करें। "
    "This model is no substitute for an agronomist: have product, dose and timing checked by an extension service "
    "(Krishi Vigyan Kendra) before anything is applied."
)
UNKNOWN = "unknown"
ASKED = ("Model", "Parameters", "Teacher", "Training rows", "Validation rows", "Steps", "Machine", "Time and cost")
"""Facts that the card gives or calls unknown; what else the run tells stands below them."""
SOME = 0.05
"""A script counts as a language of the model if so many of the letters of its sample answers are of it."""


def model_card(
    name: str,
    source: str,
    record: Record | None,
    step: int | None,
    chat: Chat,
    config: PreTrainedConfig,
    license: str | None,
    library: str = "transformers",
) -> str:
    """The card as Markdown with its front matter.

    Args:
        name: Of the model: its folder's.
        source: The checkpoint that is exported.
        record: What the checkpoint's run left; None if it is of no run.
        step: The checkpoint's; what the run did later is not told.
        chat: Tokenizer and format of the model.
        config: Of the model as it is exported.
        license: Its identifier, or None if none was given.
        library: What the files are for: `transformers` or `litgpt`.
    """
    if record is not None and step is not None:
        record = _until(record, step)
    sections = [
        f"# {name}",
        _opening(source, record),
        *(f"> **{notice}**" for notice in _notices(record)),
        "## Use",
        _use_litgpt(name) if library == "litgpt" else _use(name, chat, _is_chat(record)),
        *_example(record),
        "## Training",
        _training(record, step),
        "## Evaluation",
        _evaluation(record),
        *_test(record, source),
        "## Intended use",
        _intended(_is_chat(record)),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(record)),
        "## Licence",
        _licence(license),
    ]
    front = yaml.safe_dump(_front_matter(record, config, license, library), allow_unicode=True, sort_keys=False)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _until(record: Record, step: int) -> Record:
    """The record as if the run had ended at a step."""
    curves = {}
    for name, curve in record.curves.items():
        kept = [i for i, at in enumerate(curve.steps) if done(name, at) <= step]
        if kept:
            curves[name] = Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])
    samples = {at: answers for at, answers in record.samples.items() if at <= step}
    return replace(record, curves=curves, samples=samples)


# ---- front matter


def _front_matter(record: Record | None, config: PreTrainedConfig, license: str | None, library: str) -> dict[str, Any]:
    base = base_model(_source(record)) if record else None
    values = {
        "language": _languages(record),
        "license": license,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "base_model": base,
        "tags": list(_tags(record, config)),
    }
    return {key: value for key, value in values.items() if value}


def _languages(record: Record | None) -> list[str]:
    """Devanagari is taken for Hindi and Latin for English; none where the run left no answers to look at."""
    answers = [sample.reference for samples in (record.samples if record else {}).values() for sample in samples]
    if not answers:
        return []
    hindi = devanagari_share("\n".join(answers))
    return [code for code, share in (("hi", hindi), ("en", 1 - hindi)) if share >= SOME]


def _tags(record: Record | None, config: PreTrainedConfig) -> Iterator[str]:
    yield "agri_moe"
    if getattr(config, "num_local_experts", None):
        yield "mixture-of-experts"
    if record and record.setting("model.teacher"):
        yield "knowledge-distillation"
    if _is_chat(record):
        yield "agriculture"
        yield "conversational"


def _source(record: Record) -> str:
    keys = ("model.student.source", "model.network.source", "model.source")
    return str(next((source for key in keys if (source := record.setting(key))), ""))


def base_model(source: str) -> str | None:
    """The name on the hub of what a model was made from; None where nobody can tell.

    A folder that this package upcycled names its own source. A name counts as the hub's only if it lies in the hub's
    cache here, as it does where the run read it: a relative path looks the same.
    """
    for _ in range(8):  # an upcycled model of an upcycled model would be strange enough
        record = Path(source).expanduser() / "upcycle.json"
        if not record.is_file():
            break
        source = str(json.loads(record.read_text("utf-8")).get("source", ""))
    known = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and isinstance(
        try_to_load_from_cache(source, "config.json"), str
    )
    return source if known and not Path(source).exists() else None


# ---- sections


def _is_chat(record: Record | None) -> bool:
    return record is not None and str(record.config["data"].get("class_path")).endswith("ChatDataModule")


def _opening(source: str, record: Record | None) -> str:
    made = f"Exported by agri_moe {metadata.version('agri-moe')} from `{source}`"
    if record is None:
        return f"{made}, which belongs to no run: how that was trained is {UNKNOWN} here."
    return f"{introduction(record)}\n\n{made}."


def _notices(record: Record | None) -> list[str]:
    if not _is_chat(record):
        return []
    return [NO_SUBSTITUTE, *([NOTICE] if record and _embedded_rows(record) else [])]


def _embedded_rows(record: Record) -> bool:
    """Whether rows lie beside the notice that `corpus` writes; paths are also looked for from the run's folder up."""
    listed = record.setting("data.train")
    roots = [Path(), *record.run.folder.resolve().parents]
    readmes = [root / Path(str(p)).parent / "README.md" for p in _list(listed) for root in roots]
    return any(path.is_file() and NOTICE in path.read_text("utf-8", errors="replace") for path in readmes)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _use(name: str, chat: Chat, is_chat: bool) -> str:
    quoted = json.dumps(name, ensure_ascii=False)
    load = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted})
model = AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")"""
    if not is_chat:
        return f"""\
```python
{load}
prompt = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```"""
    mark = chat.format
    markers = ", ".join(f"`{marker}`" for marker in mark.markers.values())
    return f"""\
```python
{load}
messages = [{{"role": "user", "content": "फसल: गेहूँ\\nलक्षण: पत्तियाँ पीली"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
written = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
answer = tokenizer.parse_response(written, prefix=tokenizer.decode(prompt["input_ids"][0]))
print(answer.get("reasoning_content"), answer.get("content"), sep="\\n\\n")
```

What the model thinks comes first, then `{mark.assistant}`, then the advisory, then `{mark.end}`, at which it stops.
`{mark.assistant}` is a special token: decoded with `skip_special_tokens=True`, thought and advisory run together.
`parse_response`, of recent transformers, tells them apart, and so does `transformers serve`. Give
`enable_thinking=False` to the template for an advisory without a thought, if the training rows had such. The template
knows the roles system, user and assistant, with the thought of an earlier answer in `reasoning_content`.

A tokenizer turns the text of a control token into that token wherever it stands. Take {markers}
out of what strangers write, or ask through `agri_moe generate`, which keeps them text."""


def _use_litgpt(name: str) -> str:
    quoted = json.dumps(name, ensure_ascii=False)
    return f"""\
```python
from pathlib import Path

import torch
from litgpt import GPT, Config, Tokenizer

folder = Path({quoted})
model = GPT(Config.from_checkpoint(folder))
model.load_state_dict(torch.load(folder / "lit_model.pth", mmap=True, weights_only=True))
tokenizer = Tokenizer(folder)
```

How a prompt is written, and where an answer ends, stand in `chat_template.jinja` and `generation_config.json`."""


def _example(record: Record | None) -> list[str]:
    if not record or not record.samples:
        return []
    step, samples = max(record.samples.items())
    sample = samples[0]
    texts = {"स्थिति": sample.scenario, "विचार": sample.thought, "सलाह": sample.advisory}
    shown = "\n\n".join(f"{title}: {text}" for title, text in texts.items() if text)
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", shown))]))
    return [f"An answer to a validation scenario, after step {step:,}:", f"{fence}text\n{shown}\n{fence}"]


def _training(record: Record | None, step: int | None) -> str:
    if record is None:
        return f"Data, teacher, objective and cost are {UNKNOWN}."
    known = dict(facts(record))
    if step is not None:
        known["Steps"] = f"{step:,}; the run: {known['Steps']}"
    rows = [(name, known.get(name, UNKNOWN)) for name in dict.fromkeys((*ASKED, *known))]
    return _table(("", ""), rows)


def _evaluation(record: Record | None) -> str:
    rows: list[Row] = evaluation(record) if record else []
    if record is None or not rows:
        return f"{UNKNOWN.capitalize()}: the run left no validation up to this checkpoint."
    curves = {name: curve for name, curve in record.curves.items() if name.startswith("val/")}
    step = max(done(name, curve.steps[-1]) for name, curve in curves.items())
    before = any(row.before is not None for row in rows)
    lines = [(row.metric, *([_number(row.before)] if before else []), _number(row.after), row.meaning) for row in rows]
    head = ("metric", *(["before step 1"] if before else []), f"after step {step:,}", "what it is")
    return f"On the validation rows, in the run's own validation:\n\n{_table(head, lines)}"


def _test(record: Record | None, source: str) -> list[str]:
    """What `test` wrote into the run's folder of this very checkpoint."""
    found = tested(record) if record else None
    if found is None or found.checkpoint != Path(source).name:
        return []
    numbers = _table(("metric", "value", "95% interval", "over"), found.rows)
    return [f"On the test rows, answers included (`test`):\n\n{numbers}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _intended(is_chat: bool) -> str:
    if not is_chat:
        return "Research on distillation and on mixtures of experts, and further training."
    return (
        "Drafts of an advisory, with the reasons for it, for a person who can check them; research on distillation and "
        "on mixtures of experts. Not for decisions about crops, people, animals or money that nobody checks."
    )


def _limits(record: Record | None) -> Iterator[str]:
    yield "It knows what its rows and what it was made from taught it. Other tasks, languages and regions are untested."
    yield "It states what is wrong as fluently as what is right; no number above says whether an answer is safe."
    if record and _is_chat(record) and (length := record.setting("data.max_length")):
        yield f"Rows of more than {length:,} tokens were no part of its training."
    yield f"What it was taught to refuse, and the biases of rows, teacher and base model, are {UNKNOWN} here."


def _licence(license: str | None) -> str:
    stated = f"`{license}`." if license else f"{UNKNOWN.capitalize()}: none was given when it was exported."
    return f"{stated} The licences of base model, teacher and rows bind as well; read them before you pass this on."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
