"""The tables and the plot of ablation.py: results in, text and a picture out."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Cell -> seed -> key of a measure -> value."""

REFERENCE = "ce+kl"


class Measure(NamedTuple):
    """A number of a result, and how it is printed."""

    key: str
    title: str
    better: str  # an arrow, or nothing where neither direction is
    scale: float = 1.0
    digits: int = 3


MEASURES = (
    Measure("loss_thought", "thought", "↓"),
    Measure("loss_assistant", "advisory", "↓"),
    Measure("diagnosis", "diagnosis %", "↑", 100, 1),
    Measure("action", "action %", "↑", 100, 1),
    Measure("kl", "KL", "↓", 1, 4),
    Measure("agreement", "agree %", "↑", 100, 1),
    Measure("cka", "CKA", "↑"),
    Measure("balance_score", "balance", "↑"),
    Measure("diversity", "expert CKA", "↓"),
)


def progress(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    parts = [f"{m.title} {result[m.key] * m.scale:.{m.digits}f}" for m in MEASURES if m.key in result]
    return ", ".join([*parts, f"{result['seconds']:.0f} s"])


class Spread(NamedTuple):
    """Mean and sample standard deviation (NaN for a single value) of some numbers."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one number."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)

    def show(self, measure: Measure, sign: str = "") -> str:
        """As the table has it."""
        mean = f"{self.mean * measure.scale:{sign}.{measure.digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation * measure.scale:.{measure.digits}f}"


def spread(results: Results, cell: str, key: str) -> Spread | None:
    """A measure over the seeds of a cell."""
    values = [result[key] for result in results.get(cell, {}).values() if key in result]
    return Spread.of(values) if values else None


def paired(results: Results, cell: str, key: str, reference: str = REFERENCE) -> Spread | None:
    """A measure's difference to the reference, seed by seed, over the seeds that both have."""
    ours, theirs = results.get(cell, {}), results.get(reference, {})
    both = [seed for seed in ours if seed in theirs and key in ours[seed] and key in theirs[seed]]
    return Spread.of([ours[seed][key] - theirs[seed][key] for seed in both]) if both else None


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns of even width."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def tables(results: Results) -> str:
    """Every measure of every cell; then the differences to the reference."""
    measures = [m for m in MEASURES if any(spread(results, cell, m.key) for cell in results)]
    head = ["cell", "seeds", *(f"{m.title} {m.better}".strip() for m in measures)]

    def row(cell: str, of: Callable[[Results, str, str], Spread | None], sign: str) -> list[str]:
        spreads = [of(results, cell, m.key) for m in measures]
        shown = [s.show(m, sign) if s else "-" for s, m in zip(spreads, measures, strict=True)]
        return [cell, str(len(results[cell])), *shown]

    text = markdown(head, [row(cell, spread, "") for cell in results])
    others = [cell for cell in results if cell not in ("teacher", "start", REFERENCE)]
    if REFERENCE in results and others:
        differences = markdown(head, [row(cell, paired, "+") for cell in others])
        text += f"\n\nDifference to {REFERENCE} of the same seed:\n\n{differences}"
    return text + "\n\nMean ± sample standard deviation over seeds. " + LEGEND


LEGEND = (
    "thought, advisory: held-out loss in nats per token; KL to and agreement with the teacher on the advisory; CKA "
    "with the teacher: debiased, mean over the uniform layer map; balance: 1 is an even load; expert CKA: "
    "likeness of the experts of a layer. teacher and start (the upcycled student before training) are for comparison."
)


def plot(results: Results, path: Path) -> None:
    """A panel for each measure: a dot for each seed, a bar at each cell's mean."""
    cells = [cell for cell in results if cell != "start"]  # it would squeeze all others together
    measures = [m for m in MEASURES if any(spread(results, cell, m.key) for cell in cells)]
    figure = Figure(figsize=(3 + 0.3 * len(cells), 1.6 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    for panel, measure in zip(panels, measures, strict=True):
        for x, cell in enumerate(cells):
            values = [r[measure.key] * measure.scale for r in results[cell].values() if measure.key in r]
            panel.plot([x] * len(values), values, "o", color="tab:blue", markersize=4, alpha=0.7)
            if values:
                panel.hlines(statistics.fmean(values), x - 0.3, x + 0.3, color="black")
        panel.set_ylabel(f"{measure.title} {measure.better}".strip())
        panel.grid(axis="y", alpha=0.3)
    panels[-1].set_xticks(range(len(cells)), cells, rotation=60, ha="right")
    figure.savefig(path, dpi=150)
