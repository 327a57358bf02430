"""Predicted loss over budgets for the model of this repository."""

from __future__ import annotations

from allocation import calibrated
from matplotlib.figure import Figure

from optimum_mixrank.reporting.colours import FACTORED, GRID


TITLE = "Predicted loss over the share of parameters removed"
DESCRIPTION = "A curve on a logarithmic scale that rises steadily from 30 to 80 % of the model's parameters removed."


def draw() -> Figure:
    """Draw the result of `MixRankCompressor.profile` with the default configuration."""
    compressor, config, calibration = calibrated()
    points = compressor.profile(calibration, config, [step / 100 for step in range(30, 81, 5)]).points

    figure = Figure(figsize=(5.8, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * point.ratio for point in points], [point.loss for point in points], "o-", color=FACTORED)
    axes.set(yscale="log", xlabel="parameters removed (%)", ylabel="predicted loss (nats per image)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
