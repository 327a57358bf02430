"""Pictures over depth: how much energy the ranks keep, and the loss that is predicted for them."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from .colours import GRID, PAPER, SERIES
from .data import ReportData
from .depth import depths_of, kinds_of, label_depth


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.3, 3.6)
"""Inches; narrow enough for the screen of a phone."""

_MARKERS = "osD^vPX*"


def draw_kept_energy(report: ReportData) -> Figure | None:
    """Draw the share of energy that one-shot factors keep, with a line for each kind of layer.

    Return None if no layer is factored.
    """
    if all(layer.kept_energy is None for layer in report.layers):
        return None
    figure, axes = new_figure()
    depths = depths_of(report.layers)
    for (kind, layers), colour, marker in zip(kinds_of(report.layers).items(), cycle(SERIES), cycle(_MARKERS)):
        points = [(depths[layer.name], layer.kept_energy) for layer in layers if layer.kept_energy is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, [100 * share for share in y], color=colour, marker=marker, markersize=4, lw=1.3, label=kind)
    axes.set_ylabel("kept energy (%)")
    _finish(figure, axes, report)
    return figure


def draw_predicted_loss(report: ReportData) -> Figure | None:
    """Draw the predicted loss of every block before compensation as a bar, divided among its layers.

    Return None if the metric's losses have no common unit.
    """
    if all(layer.predicted_loss is None for layer in report.layers):
        return None
    figure, axes = new_figure()
    depths = depths_of(report.layers)
    height = dict.fromkeys(depths.values(), 0.0)
    for (kind, layers), colour in zip(kinds_of(report.layers).items(), cycle(SERIES)):
        label: str | None = kind
        for layer in layers:
            if layer.predicted_loss is None:
                continue
            depth = depths[layer.name]
            (bar,) = axes.bar(
                depth,
                layer.predicted_loss,
                bottom=height[depth],
                width=0.72,
                color=colour,
                edgecolor=PAPER,
                linewidth=0.5,
                label=label,
                zorder=2,
            )
            bar.set_gid(layer.name)
            height[depth] += layer.predicted_loss
            label = None
    axes.set_ylabel("predicted loss (nats per image)")
    axes.set_ylim(0, None)
    _finish(figure, axes, report)
    return figure


def new_figure() -> tuple[Figure, Axes]:
    """Return a small figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=2)
    return figure, axes


def add_legend(figure: Figure, columns: int = 2) -> None:
    """Put a legend below the axes, where it covers nothing."""
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _finish(figure: Figure, axes: Axes, report: ReportData) -> None:
    depths = depths_of(report.layers)
    label_depth(axes, report.layers, depths, room=72 * (SIZE[0] - 0.8) / (max(depths.values()) + 1))
    add_legend(figure)
