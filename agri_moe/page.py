"""The page of a run, or of several: sections of sentences, pictures and tables as one HTML file without a network.

Text of the rows stands in the HTML, where the reader's own fonts shape it, never in a picture.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from matplotlib.figure import Figure

from agri_moe.evaluation import MEANINGS
from agri_moe.pictures import (
    draw_attention,
    draw_compared,
    draw_followed,
    draw_matrices,
    draw_routing,
    draw_terms,
    png,
)
from agri_moe.reporting import (
    Record,
    Sample,
    evaluation,
    facts,
    introduction,
    say_attention,
    say_cka,
    say_experts,
    say_groups,
    say_losses,
    say_routing,
    say_topics,
    tested,
    warnings,
)
from agri_moe.runs import differences, identity, replace_text

T = TypeVar("T")

TOPICS = 20
"""Values of a column that are shown at most."""
SIMILARITY = (
    "python main.py similarity --source {run}/checkpoints/step=NNNNNNNN.ckpt --target MODEL --data ROWS "
    "--output {run}/similarity{more}, and then this command again, puts it here."
)


class Picture(NamedTuple):
    """A picture, or a PNG's content, and what is written below it; `name` becomes the file's."""

    name: str
    content: Figure | bytes
    caption: str


@dataclass
class Section:
    """A part of a page.

    Attributes:
        title: Its heading.
        said: Plain sentences.
        pictures: What is shown.
        html: What else stands there, escaped already.
        warnings: Sentences that should not be missed.
    """

    title: str
    said: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    html: str = ""
    warnings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- pages


def run_page(record: Record, folder: Path) -> Path:
    """Write the page of one run into `folder`; returns its path."""
    sections = [
        _summary(record),
        _losses(record),
        _validation(record),
        _answers(record),
        _samples(record),
        _cka(record),
        _load(record),
        _routing(record),
        _experts(record),
        *_groups(record),
        *_topics(record),
        _attention(record),
        Section("Configuration", html=_folded("The whole resolved config", _yaml(record.config))),
    ]
    return _write(folder, f"Run {record.name}", introduction(record), sections)


def compared_page(records: Sequence[Record], folder: Path) -> Path:
    """Write the page that compares runs into `folder`; returns its path."""
    names = _distinct_names(records)
    sections = [_compared_runs(records, names), _compared_settings(records, names), _compared_values(records, names)]
    if (section := _compared_curves(records, names)) is not None:
        sections.append(section)
    return _write(folder, f"{len(records)} runs compared", "Of one run alone, report --run tells more.", sections)


def _write(folder: Path, title: str, intro: str, sections: Iterable[Section]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for section in sections:
        for i, (name, picture, caption) in enumerate(section.pictures):
            content = png(picture) if isinstance(picture, Figure) else picture
            (folder / f"{name}.png").write_bytes(content)
            section.pictures[i] = Picture(name, content, caption)
        parts.append(render(section))
    page = folder / "index.html"
    replace_text(page, PAGE.substitute(title=escape(title), intro=escape(intro), body="\n".join(parts)))
    return page


# ---------------------------------------------------------------------- sections of one run


def _missing(how: str) -> list[str]:
    return [f"Not recorded by this run. {how}"]


def _summary(record: Record) -> Section:
    said = (
        []
        if warnings(record)
        else ["Nothing to warn about: no collapsed layer, idle expert, loss spike or rising validation loss was found."]
    )
    return Section("What was trained", said, html=table(facts(record)), warnings=warnings(record))


def _losses(record: Record) -> Section:
    figure = draw_terms(record)
    if figure is None:
        return Section("Losses", _missing("Curves are read from TensorBoard's files: leave trainer.logger alone."))
    caption = (
        "Each panel is one term of the loss, unweighted: blue in training, step by step, orange on the validation "
        "rows. In validation, cross-entropy is without label smoothing and the divergence at temperature 1."
    )
    pictures = [Picture("losses", figure, caption)]
    if (followed := draw_followed(record)) is not None:
        more = (
            "What follows from cross-entropy and load: perplexity, how even the experts' load is, the share of experts "
            "that got no token (in training, of one step), and perplexity that a collapsed router cannot hide behind."
        )
        pictures.append(Picture("perplexity", followed, more))
    return Section("Losses", say_losses(record), pictures)


def _validation(record: Record) -> Section:
    rows = evaluation(record)
    if not rows:
        return Section("Validation", _missing("Set data.validation, and trainer.val_check_interval."))
    said = []
    if all(row.before is None for row in rows):
        said = ["How the model did before its first step is not recorded: the callback ValidateFirst does that."]
    cells = [(row.metric, _number(row.before), _number(row.after), row.meaning) for row in rows]
    return Section("Validation", said, html=table(cells, ("metric", "before training", "at the end", "what it is")))


def _answers(record: Record) -> Section:
    title, found = "Answers to test rows", tested(record)
    if found is None:
        return Section(title, _missing("python main.py test scores what the model answers."))
    said = [f"Of {found.checkpoint}, which wrote every answer itself; the answers stand in test_answers.jsonl."]
    cells = [(*row, MEANINGS.get(row[0], "")) for row in found.rows]
    head = ("metric", "value", "95% interval", "over", "what it is")
    return Section(title, said, html=table(cells, head))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _samples(record: Record) -> Section:
    title = "Sample advisories"
    if not record.samples:
        return Section(title, _missing("The callback SampleAdvisories does that, at every validation."))
    shown = _ends(record.samples)
    said = [
        "Greedy answers to the first validation scenarios: the student's, the teacher's where it could be asked, and "
        "what stands in the row."
    ]
    return Section(title, said, html=answers(shown))


def _cka(record: Record) -> Section:
    title = "Layers of student and teacher"
    if not record.cka:
        return Section(title, _missing("The callback CKAMonitor does that, where a teacher answers in the run."))
    figure = draw_matrices(
        _ends({step: arrays["cka"] for step, arrays in record.cka.items()}), x="teacher layer", y="student layer"
    )
    caption = "Debiased linear CKA of the residual streams at validation tokens; bright is alike."
    return Section(title, say_cka(record), [Picture("cka", figure, caption)])


def _load(record: Record) -> Section:
    title = "Load of the experts"
    if not record.routing:
        return Section(title, _missing("The callback RouterMonitor does that, where the model has experts."))
    loads = {step: arrays["load"] for step, arrays in record.routing.items()}
    figure = draw_matrices(_ends(loads), x="expert", y="layer", top=2 / next(iter(loads.values())).shape[1], share=True)
    caption = (
        "Each cell is the share of a layer's assignments that an expert got on the validation rows; full colour is "
        "twice the even share."
    )
    return Section(title, say_routing(record), [Picture("expert_load", figure, caption)])


def _routing(record: Record) -> Section:
    title = "Routers over time"
    figure = draw_routing(record)
    if figure is None:
        return Section(title, _missing("The callback RouterMonitor does that, where the model has experts."))
    said = [
        "Entropy says how certain a router is of each token: it falls as the router learns to choose. Balance says how "
        "even the experts' load is: it should stay near 1 while entropy falls. A layer whose balance sinks collapses."
    ]
    return Section(
        title,
        said,
        [
            Picture(
                "routing",
                figure,
                "On the training rows, one line per layer, from dark, the first, to bright, the last.",
            )
        ],
    )


def _experts(record: Record) -> Section:
    title = "Experts of a layer with each other"
    if "experts" not in record.similarity:
        how = SIMILARITY.format(run=record.run.folder, more="")
        return Section(title, _missing(f"For a model with experts, {how}"))
    layers = record.similarity["expert_layers"].tolist()
    matrices = {f"layer {n}": m for n, m in zip(layers, record.similarity["experts"], strict=True)}
    figure = draw_matrices(matrices, x="expert", y="expert")
    caption = "CKA of what every expert makes of the same tokens, whether or not they are sent to it."
    return Section(title, say_experts(record.similarity), [Picture("experts", figure, caption)])


def _groups(record: Record) -> list[Section]:
    """What validation told of groups of rows, where it told any apart."""
    by_step = {step: arrays for step, arrays in record.routing.items() if "load_by_group" in arrays}
    if not by_step:
        return []
    now = by_step[max(by_step)]
    order = np.argsort(-now["tokens"], kind="stable")
    first = {_moment(step): by_step[step]["ce"] for step in dict.fromkeys((min(by_step), max(by_step)))}
    names, column = now["groups"][order].tolist(), str(now["group_by"])
    cells = [
        (name, f"{now['tokens'][g]:,.0f}", *(_number(float(ce_G[g])) for ce_G in first.values()))
        for name, g in zip(names, order.tolist(), strict=True)
    ]
    losses = table(cells, (column, "tokens", *(f"cross-entropy {moment}" for moment in first)))
    load_LGE = now["load_by_group"][:, order]
    said = [*say_groups(by_step), *_explain(column, len(names))]
    html = losses + _by_layer(range(len(load_LGE)), load_LGE, names)
    return [Section("Groups of the validation rows", said, html=html)]


def _topics(record: Record) -> list[Section]:
    title = "Experts by topic"
    found = record.similarity
    if "load_by_group" not in found:
        if any("load_by_group" in arrays for arrays in record.routing.values()):
            return []
        how = SIMILARITY.format(run=record.run.folder, more=" --group_by COLUMN")
        return [Section(title, _missing(f"For a model with experts, data.group_by does that in a run. Or {how}"))]
    groups, column = found["groups"].tolist(), str(found["group_by"])
    said = [*say_topics(found), *_explain(column, len(groups))]
    return [Section(title, said, html=_by_layer(found["expert_layers"].tolist(), found["load_by_group"], groups))]


def _explain(column: str, groups: int) -> list[str]:
    said = [
        f"Rows are the values of {column}, columns the experts; a cell is the share of that value's assignments in the "
        "layer that the expert got."
    ]
    if groups > TOPICS:
        said.append(f"Of experts, the {TOPICS} of {groups:,} values with the most tokens are shown.")
    return said


def _by_layer(layers: Iterable[int], load_LGE: Any, groups: Sequence[str]) -> str:
    tables = [
        f"<h3>layer {layer}</h3>{heat_table(load_GE[:TOPICS], groups[:TOPICS])}"
        for layer, load_GE in zip(layers, load_LGE, strict=True)
    ]
    return f'<div class="side">{"".join(f"<div>{t}</div>" for t in tables)}</div>'


def _attention(record: Record) -> Section:
    title = "Attention from the advisory to the thought"
    if not record.attention:
        return Section(title, _missing("The callback AttentionMonitor does that, for rows with thoughts."))
    shares = _ends({step: arrays["share"] for step, arrays in record.attention.items()})
    caption = "Share of the attention of the positions that write the advisory which falls on the thought's tokens."
    pictures = [Picture("attention", draw_attention(shares), caption)]
    maps = record.images.get("attention_map", [])
    seen = "One validation row in the last layer{}: bright is where a position of the advisory looks."
    if len(maps) > 1:
        pictures.append(Picture("attention_map_first", maps[0], seen.format(", when it was first looked at")))
    if maps:
        pictures.append(Picture("attention_map_last", maps[-1], seen.format(", as training ended")))
    return Section(title, say_attention(record), pictures)


def _ends(by_step: Mapping[int, T]) -> dict[str, T]:
    """The first and the last of what was recorded, under names for the reader."""
    steps = list(by_step)
    return {_moment(step): by_step[step] for step in dict.fromkeys((steps[0], steps[-1]))}


def _moment(step: int) -> str:
    return f"after {step:,} steps" if step else "before training"


# ---------------------------------------------------------------------- sections of a comparison


def _distinct_names(records: Sequence[Record]) -> list[str]:
    """The folders' names, with their numbers on the command line where two are alike."""
    names = [record.name for record in records]
    return [name if names.count(name) == 1 else f"{i + 1}: {name}" for i, name in enumerate(names)]


def _compared_runs(records: Sequence[Record], names: Sequence[str]) -> Section:
    by_run = [dict(facts(record)) for record in records]
    keys = list(dict.fromkeys(key for lines in by_run for key in lines))
    cells = [(key, *(lines.get(key, "–") for lines in by_run)) for key in keys]
    said = [f"{name}: {record.run.folder}" for name, record in zip(names, records, strict=True)]
    alarms = [f"{name}: {text}" for name, record in zip(names, records, strict=True) for text in warnings(record)]
    return Section("The runs", said, html=table(cells, ("", *names)), warnings=alarms)


def _compared_settings(records: Sequence[Record], names: Sequence[str]) -> Section:
    first = identity(records[0].config)
    sections = []
    for name, record in zip(names[1:], records[1:], strict=True):
        lines = differences(first, identity(record.config))
        text = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines) or "<li>nothing</li>"
        sections.append(f"<h3>{escape(names[0])} → {escape(name)}</h3><ul>{text}</ul>")
    said = ["Settings that differ from the first run's; where a run happens, how long and what it logs are left out."]
    return Section("What differs", said, html="".join(sections))


def _compared_values(records: Sequence[Record], names: Sequence[str]) -> Section:
    by_run = [{row.metric: row for row in evaluation(record)} for record in records]
    metrics = list(dict.fromkeys(metric for rows in by_run for metric in rows))
    cells = []
    for metric in metrics:
        found = [rows.get(metric) for rows in by_run]
        meaning = next(row.meaning for row in found if row is not None)
        cells.append((metric, *(_number(row and row.after) for row in found), meaning))
    said = ["The last validation of each run. Compare only runs that were validated on the same rows."]
    return Section("Validation", said, html=table(cells, ("metric", *names, "what it is")))


def _compared_curves(records: Sequence[Record], names: Sequence[str]) -> Section | None:
    shown = ("train/ce", "train/kl", "val/ce", "val/kl", "val/agreement", "val/balance_score")
    curves = {
        metric: {n: r.curves[metric] for n, r in zip(names, records, strict=True) if metric in r.curves}
        for metric in shown
    }
    curves = {metric: by_run for metric, by_run in curves.items() if by_run}
    return Section("Curves", [], [Picture("curves", draw_compared(curves), "")]) if curves else None


# ---------------------------------------------------------------------- HTML


def table(rows: Iterable[Sequence[str]], head: Sequence[str] | None = None) -> str:
    """An HTML table; the first cell of each row is its name."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head or ())
    lines = [f"<tr>{top}</tr>"] if top else []
    for name, *cells in rows:
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def heat_table(shares: Any, names: Sequence[str]) -> str:
    """A heat map [rows, experts] of shares as a table, so that its names may be in any script."""
    head = "".join(f"<th>{expert}</th>" for expert in range(shares.shape[1]))
    lines = [f"<tr><th></th>{head}</tr>"]
    for name, row in zip(names, shares, strict=True):
        cells = "".join(
            f'<td class="heat" style="background: rgb(42 120 190 / {min(v * len(row) / 2, 1):.2f})">{v:.0%}</td>'
            for v in row.tolist()
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def answers(by_moment: Mapping[str, Sequence[Sample]]) -> str:
    """Scenarios with the answers of each moment beside the row's own."""
    cards = []
    for same in zip(*by_moment.values(), strict=False):
        last = same[-1]
        columns = [
            _column(f"student {moment}", s.thought, s.advisory) for moment, s in zip(by_moment, same, strict=True)
        ]
        if last.teacher_advisory is not None:
            columns.append(_column("teacher", last.teacher_thought, last.teacher_advisory))
        columns.append(_column("the row", None, last.reference))
        scenario = _paragraph("स्थिति", last.scenario)
        cards.append(f'<div class="card" lang="hi">{scenario}<div class="side">{"".join(columns)}</div></div>')
    return "".join(cards)


def _column(name: str, thought: str | None, advisory: str) -> str:
    written = "" if thought is None else _paragraph("विचार", thought)
    return f"<div><h4>{escape(name)}</h4>{written}{_paragraph('सलाह', advisory)}</div>"


def _paragraph(name: str, text: str) -> str:
    return f'<p class="text"><b>{name}</b> {escape(text) or "–"}</p>'


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def render(section: Section) -> str:
    """A section as HTML."""
    alarms = "".join(f'<p class="warning">{escape(text)}</p>' for text in section.warnings)
    said = "".join(f"<p>{escape(text)}</p>" for text in section.said)
    pictures = "".join(
        f'<figure><img src="data:image/png;base64,{b64encode(content).decode()}" alt="{escape(section.title)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for _, content, caption in section.pictures
        if isinstance(content, bytes)
    )
    return f"<section><h2>{escape(section.title)}</h2>{alarms}{said}{pictures}{section.html}</section>"


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #d4d4d0; --soft: #f4f4f1; --faint: #5c5c58; --alarm: #8a3b00;
  --alarm-soft: #fff1e4; }
@media (prefers-color-scheme: dark) {
  :root { --line: #44443f; --soft: #262624; --faint: #a5a5a0; --alarm: #ffb77a; --alarm-soft: #3a2a1c; }
}
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans Devanagari", sans-serif; max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid var(--line); padding: .5rem 0 1.5rem; }
p { max-width: 48rem; }
figure { margin: 1rem 0; }
figcaption { max-width: 48rem; color: var(--faint); font-size: .9rem; }
img { display: block; max-width: 100%; background: white; border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.wide { overflow-x: auto; }
.heat { padding: .25rem .5rem; text-align: right; }
.warning { color: var(--alarm); background: var(--alarm-soft); padding: .5rem .8rem; border-radius: 6px; }
.card { background: var(--soft); border-radius: 8px; padding: .3rem 1rem; margin: 1rem 0; }
.side { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.side > div { flex: 1 1 13rem; }
.text { white-space: pre-line; line-height: 1.7; }
h3, h4 { margin-bottom: .2rem; }
pre { white-space: pre-wrap; background: var(--soft); padding: 1rem; border-radius: 6px; }
</style></head>
<body><h1>$title</h1>
<p>$intro</p>
$body
</body></html>
""")
