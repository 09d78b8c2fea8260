"""Widths of experts over the course of a layer-wise run.

Shapes: E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def draw_widths(history: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per layer, one line per expert.

    Args:
        history: Of each reallocation: `layer`, `step`, and `widths` [E] from then on.
    """
    layers = sorted({entry["layer"] for entry in history})
    figure = Figure(figsize=(5, 1 + 1.5 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
    for axes, layer in zip(panels, layers, strict=True):
        entries = [entry for entry in history if entry["layer"] == layer]
        axes.step([entry["step"] for entry in entries], [entry["widths"] for entry in entries], where="post")
        axes.set(ylabel=f"layer {layer}")
    panels[-1].set(xlabel="optimizer step")
    figure.suptitle("neurons of each expert")
    return figure
