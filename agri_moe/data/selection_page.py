"""The page of a selection: what was there, what was chosen and why, in numbers, a picture and examples."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agri_moe.data.selection import DENSITY, LETTERS, NGRAM, REPEATED, Rule
from agri_moe.page import PAGE, Picture, Section, render, table
from agri_moe.pictures import png
from agri_moe.runs import replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from agri_moe.data.selection_passes import Selection

GROUPS = 200
"""Groups that are shown at most, the largest ones."""
BAD = 50
ENDS = {
    "highest": "Chosen, the highest scores",
    "lowest": "Chosen, the lowest scores",
    "last": "Not chosen, the lowest scores",
    "damped": "The most repetitive rows",
    "near": "Left out as near repeats of better rows",
    "garbled": "Left out as noise",
}
FATES = {
    "CHOSEN": "chosen",
    "BEYOND_BUDGET": "beyond the budget",
    "REPEAT": "repeats another row",
    "NEAR_REPEAT": "much like a better row",
    "GARBLED": "noise",
}


def said(found: Mapping[str, Any], rule: Rule) -> list[str]:
    """What came of it, in sentences."""
    fates = found["fates"]
    lines = [
        f"{found['rows']:,} rows read, {found['tokens']:,} tokens: {fates['REPEAT']:,} repeat another row, "
        f"{fates['NEAR_REPEAT']:,} are much like a better one, {fates['GARBLED']:,} are noise; "
        f"{found['damped']:,} lost more than a tenth of their score to repetition.",
        f"Chosen: {fates['CHOSEN']:,} rows, {found['chosen_tokens']:,} tokens, of a budget of {found['budget']:,} "
        f"{rule.unit}.",
    ]
    if not fates["BEYOND_BUDGET"] and found["left"]:
        lines.append("The budget is larger than what is left without repeats and noise: all of that was taken.")
    elif found["left"]:
        lines.append(f"{found['left']:,} {rule.unit} of the budget are left, too few for any further row of a group.")
    if found["bad"]:
        lines.append(f"{found['bad']:,} rows could not be used and were skipped; the first is {found['rejected'][0]}.")
    return lines


def selection_page(found: Mapping[str, Any], selection: Selection, folder: Path) -> Path:
    """Write index.html and its picture into a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = png(draw_scores(found["histograms"]))
    (folder / "scores.png").write_bytes(picture)
    sections = [
        Section("What was chosen", said(found, selection.rule), html=table(_settings(selection))),
        Section("Scores", _score_said(selection), [Picture("scores", picture, _CAPTION)]),
        _groups(found),
        Section("Examples", ["Of long texts, the beginning."], html=_examples(found["examples"])),
    ]
    if found["rejected"]:
        sections.append(Section("Rows that could not be used", [*found["rejected"][:BAD]]))
    body = "\n".join(render(section) for section in sections)
    intro = f"{selection.output}, from {', '.join(_names(selection.input))}."
    page = folder / "index.html"
    replace_text(page, PAGE.substitute(title="Selection of rows", intro=escape(intro), body=body))
    return page


_CAPTION = (
    "Rows by score, and by the logarithm (base 10) of their length in tokens: all usable rows, and in front those "
    "that were chosen."
)


def draw_scores(histograms: Mapping[str, Mapping[str, list[float]]]) -> Figure:
    """Two panels, the score and the length: all rows, and the chosen ones in front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"score": "score", "tokens": "log10 of the tokens"}
    for panel, (name, title) in zip(axes, titles.items(), strict=True):
        edges = histograms[name]["edges"]
        panel.stairs(histograms[name]["all"], edges, fill=True, color="0.8", label="all")
        panel.stairs(histograms[name]["chosen"], edges, fill=True, color="tab:blue", alpha=0.8, label="chosen")
        panel.set(xlabel=title, ylabel="rows")
        panel.grid(alpha=0.3)
    axes[0].legend()
    return figure


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _settings(selection: Selection) -> list[tuple[str, str]]:
    rule = selection.rule
    budget = f"{rule.share:.4g} of the {rule.unit}" if rule.share is not None else f"{rule.budget:,} {rule.unit}"
    return [
        ("budget", budget),
        ("groups", ", ".join(selection.group_by) or "none"),
        ("allocation", rule.allocation),
        ("within a group", rule.within),
        ("score", selection.score_by),
        ("tokens of", str(selection.model or selection.tokenizer)),
        ("near duplicates from", f"{rule.near:g}"),
        ("damping", "on" if rule.damp else "off"),
        ("seed", str(selection.seed)),
    ]


def _score_said(selection: Selection) -> list[str]:
    kinds = {
        "unigram": "the entropy of a row's tokens in nats",
        "bigram": "the entropy of a row's pairs of adjacent tokens in nats",
        "model_entropy": "the mean entropy of a model's predictions along a row, in nats",
        "model_loss": "a model's mean loss on a row, in nats per token",
    }
    lines = [f"The score is {kinds[selection.score_by]}."]
    if selection.rule.damp:
        lines.append(
            f"It is multiplied by the share of the row's {NGRAM}-grams of tokens that do not repeat an earlier one. "
            f"Noise is a row with less than {LETTERS:.0%} letters, with more than {REPEATED:.0%} repeats, or whose "
            f"tokens hold less than {DENSITY:.0%} of the bytes that is usual in its group."
        )
    return lines


def _groups(found: Mapping[str, Any]) -> Section:
    groups = sorted(found["groups"], key=lambda group: (-group["rows"], group["name"]))
    rows = [
        (
            group["name"],
            f"{group['rows']:,.0f}",
            f"{group['tokens']:,.0f}",
            f"{group['tokens'] / found['tokens']:.1%}",
            f"{group['repeats']:,.0f}",
            f"{group['garbled']:,.0f}",
            f"{group['score'] / group['rows']:.2f}",
            f"{group['chosen_rows']:,.0f}",
            f"{group['chosen_tokens']:,.0f}",
            f"{group['chosen_tokens'] / max(found['chosen_tokens'], 1):.1%}",
            f"{group['chosen_score'] / group['chosen_rows']:.2f}" if group["chosen_rows"] else "–",
        )
        for group in groups[:GROUPS]
    ]
    head = ("group", "rows", "tokens", "share of tokens", "repeats", "noise", "mean score")
    more = [f"The {GROUPS} largest of {len(groups):,} groups."] if len(groups) > GROUPS else []
    return Section("Groups", more, html=table(rows, (*head, "chosen", "tokens", "share of tokens", "mean score")))


def _examples(examples: Mapping[str, list[dict[str, Any]]]) -> str:
    parts = []
    for name, title in ENDS.items():
        if not examples[name]:
            continue
        parts.append(f"<h3>{escape(title)}</h3>")
        for row in examples[name]:
            facts = (
                f"{row['group']}: score {row['score']:.3f}, {row['tokens']:,} tokens, repetition "
                f"{row['repetition']:.0%}, {FATES[row['fate']]}"
            )
            parts.append(f'<div class="card"><h4>{escape(facts)}</h4><p class="text">{escape(row["text"])}</p></div>')
    return "".join(parts)
