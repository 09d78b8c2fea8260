"""The pictures of a report: matrices, curves and bars, for a page or a paper.

No text of the rows stands in them: matplotlib does not shape Devanagari.

Shapes: L layers, E experts, X and Y layers of two models.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from agri_moe.reporting import Curve, Record, done

Array = np.ndarray[Any, Any]
TITLES = {
    "ce": "ce: cross-entropy",
    "kl": "kl: divergence from the teacher",
    "cka": "cka: 1 - CKA with the teacher",
    "hidden": "hidden: distance of layers",
    "attention": "attention: divergence",
    "diversity": "diversity: CKA of experts",
    "balance": "balance: 1 is even",
    "router_z": "router_z: z-loss",
}
FOLLOWED = {
    "perplexity": "perplexity",
    "balanced_perplexity": "balanced perplexity",
    "balance_score": "balance score: 1 is even",
    "dead_experts": "share of dead experts",
    "max_violation": "busiest expert above the mean",
    "dropped": "share of assignments dropped",
    "router_temperature": "router temperature",
}
NOT_TERMS = ("learning_rate", "gradient_norm", "stage", "temperature", *FOLLOWED)


def png(figure: Figure) -> bytes:
    """The picture as a file's content."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def draw_terms(record: Record) -> Figure | None:
    """A panel for each term, training and validation; None if nothing was logged."""
    names = [name.removeprefix("train/") for name in record.curves if name.startswith("train/")]
    terms = [name for name in names if name not in NOT_TERMS and "/" not in name]
    return _draw_splits(record, {term: TITLES.get(term, term) for term in terms})


def draw_followed(record: Record) -> Figure | None:
    """The same for what follows from the terms: perplexity, balance, dead experts."""
    return _draw_splits(record, {name: title for name, title in FOLLOWED.items() if f"train/{name}" in record.curves})


def _draw_splits(record: Record, titles: Mapping[str, str]) -> Figure | None:
    if not titles:
        return None
    figure, panels = _grid(len(titles), 3.6, 2.6)
    for axes, (term, title) in zip(panels, titles.items(), strict=True):
        for split, style in (("train", {"color": "tab:blue"}), ("val", {"color": "tab:orange", "marker": "o"})):
            curve = record.curves.get(f"{split}/{term}")
            if curve is not None:
                _plot(axes, f"{split}/{term}", curve, split, **style)
        axes.set_title(title)
        _log_if_wide(axes, [record.curves[f"train/{term}"]])
    panels[0].legend()
    return figure


def draw_compared(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """A panel for each metric, a line for each run: metric -> run -> curve."""
    figure, panels = _grid(len(curves), 4.6, 3.2)
    for axes, (metric, by_run) in zip(panels, curves.items(), strict=True):
        for run, curve in by_run.items():
            _plot(axes, metric, curve, run, marker="o" if len(curve.steps) < 30 else None)
        axes.set_title(metric)
        _log_if_wide(axes, list(by_run.values()))
        axes.legend(fontsize=8)
    return figure


def draw_routing(record: Record) -> Figure | None:
    """Entropy and balance of every layer's router over training; None if they were not logged."""
    kinds = {
        "router_entropy": "router entropy (1: undecided)",
        "expert_balance": "balance of the load (1: even)",
    }
    found = {
        kind: {name: curve for name, curve in record.curves.items() if name.startswith(f"{kind}/layer_")}
        for kind in kinds
    }
    if not all(found.values()):
        return None
    figure, panels = _grid(2, 5, 3.2)
    for axes, kind in zip(panels, kinds, strict=True):
        for i, (name, curve) in enumerate(sorted(found[kind].items())):
            colour = _layer_colour(i, len(found[kind]))
            _plot(axes, name, curve, f"layer {int(name[-2:])}", color=colour)
        axes.set_title(kinds[kind])
    if len(found["router_entropy"]) <= 12:
        panels[1].legend(fontsize=8)
    return figure


def draw_matrices(
    matrices: Mapping[str, Array], *, x: str, y: str, top: float | None = 1.0, share: bool = False
) -> Figure:
    """Heat maps beside each other on one scale from 0, each under its title.

    Args:
        matrices: Title -> [rows, columns].
        x: What the columns are.
        y: What the rows are; the first is at the bottom.
        top: The value of full colour; None takes the largest.
        share: Label cells and scale in percent.
    """
    first = next(iter(matrices.values()))
    rows, columns = first.shape
    limit = top if top is not None else max(float(m.max()) for m in matrices.values())
    most = 6.5 if len(matrices) <= 3 else 3.4  # inches
    width, height = (min(max(2.8, 0.36 * n + 1.6), most) for n in (columns, rows))
    figure, panels = _grid(len(matrices), width, 0.9 * height)
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(matrix, origin="lower", cmap="viridis", vmin=0, vmax=limit, aspect="auto")
        axes.set(xlabel=x, ylabel=y, title=title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        if (width - 1.4) / columns > 0.3:  # room for a number in a cell
            for (row, column), value in np.ndenumerate(matrix):
                text = f"{100 * value:.0f}%" if share else f"{value:.2f}"
                dark = value < 0.6 * limit
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=panels, extend="max" if share else "neither")
    return figure


def draw_attention(shares: Mapping[str, Array]) -> Figure:
    """Share of the advisory's attention on the thought by layer, a line for each moment."""
    figure, (axes,) = _grid(1, 6, 3.2)
    for (label, share_L), colour in zip(shares.items(), ("0.6", "tab:green"), strict=False):
        axes.plot(np.arange(len(share_L)), 100 * share_L, "o-", color=colour, label=label)
    axes.set(xlabel="layer", ylabel="% of the attention")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def _grid(panels: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    columns = min(panels, 4 if width < 3.5 else 3 if width < 4.5 else 2 if width < 8 else 1)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, list(axes[:panels])


def _plot(axes: Any, name: str, curve: Curve, label: str, **style: Any) -> None:
    axes.plot(
        [done(name, step) for step in curve.steps], curve.values, label=label, linewidth=1.3, markersize=4, **style
    )
    axes.set_xlabel("optimizer steps")
    axes.grid(alpha=0.3)


def _log_if_wide(axes: Any, curves: Sequence[Curve]) -> None:
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _layer_colour(layer: int, layers: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * layer / max(layers - 1, 1))
