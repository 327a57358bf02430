"""Pictures over parameters: predicted and measured loss, and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from ..allocation.profile import NATS
from ..runtime.intervals import wilson_interval
from .colours import BREAK_EVEN, FACTORED, INK
from .data import ReportData
from .depth_plots import add_legend, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_loss(report: ReportData, others: Sequence[ReportData] = ()) -> Figure | None:
    """Draw the predicted loss of many budgets with the chosen one marked, and the measured losses of all reports.

    Return None if there is nothing to compare.
    """
    budgets = [budget for budget in report.profile if budget["loss"] > 0]
    points = [(each.model_parameters_after, found["kl"]) for each, found in measured((report, *others), "kl")]
    points = [(parameters, kl) for parameters, kl in points if kl > 0]
    unit = report.loss_unit
    if unit != NATS:
        # Metrics other than K-FAC predict in units of their own; a single measured point says nothing.
        budgets, points, unit = ([], points, NATS) if len(points) > 1 else (budgets, [], unit)
    if not budgets and len(points) < 2:
        return None
    figure, axes = new_figure()
    if budgets:
        x, y = zip(*((budget["model_parameters"], budget["loss"]) for budget in budgets), strict=True)
        axes.plot(x, y, "o-", color=FACTORED, markersize=3.5, lw=1.3, label="predicted, before compensation")
    for budget in budgets:
        if budget["compression_ratio"] == report.settings.get("compression_ratio"):
            at = (budget["model_parameters"], budget["loss"])
            axes.plot(*at, "o", color=INK, markersize=10, fillstyle="none", label="chosen budget")
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "D", color=BREAK_EVEN, markersize=6, label="measured KL of the result")
    _scale_losses(axes)
    axes.set_ylabel(f"loss ({unit})")
    _finish(figure, axes, report)
    return figure


def draw_accuracy(report: ReportData, others: Sequence[ReportData] = ()) -> Figure | None:
    """Draw the top-1 accuracy of the original and of the compressed models, with 95 % intervals.

    Return None if there are no more than two points, which figures say better.
    """
    evaluated = measured((report, *others), "top1")
    if len(evaluated) + len(measured([report], "reference_top1")) <= 2:
        return None
    figure, axes = new_figure()
    for _, found in measured([report], "reference_top1"):
        before = (report.model_parameters_before, found["reference_top1"], found["num_images"])
        _draw_shares(axes, [before], INK, "s", "original")
    points = [(each.model_parameters_after, found["top1"], found["num_images"]) for each, found in evaluated]
    _draw_shares(axes, points, BREAK_EVEN, "D", "compressed")
    axes.set_ylabel("top-1 accuracy (%)")
    _finish(figure, axes, report)
    return figure


def measured(reports: Sequence[ReportData], name: str) -> list[tuple[ReportData, Mapping[str, Any]]]:
    """Return the reports whose evaluation has a value of this name, with their evaluations."""
    evaluated = [(report, report.evaluation) for report in reports if report.evaluation is not None]
    return [(report, found) for report, found in evaluated if found.get(name) is not None and found.get("num_images")]


def _scale_losses(axes: Axes) -> None:
    """Make the axis logarithmic over at least a decade, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    room = max(1.0, sqrt(10 * low / high))
    axes.set_ylim(low / room, high * room)
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_shares(axes: Axes, points: Sequence[tuple[int, float, int]], colour: str, marker: str, label: str) -> None:
    below, above = [], []
    for _, share, count in points:
        low, high = wilson_interval(share, count)
        below.append(100 * (share - low))
        above.append(100 * (high - share))
    axes.errorbar(
        [parameters for parameters, _, _ in points],
        [100 * share for _, share, _ in points],
        yerr=[below, above],
        color=colour,
        marker=marker,
        markersize=6,
        linestyle="none",
        elinewidth=1.2,
        capsize=3,
        label=label,
    )


def _finish(figure: Figure, axes: Axes, report: ReportData) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(0, 1.06 * report.model_parameters_before)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("parameters of the model")
    add_legend(figure)
