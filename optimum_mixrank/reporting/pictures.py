"""The pictures of a report's page, each with words that say the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..allocation.profile import NATS
from ..runtime.formatting import format_count, percent
from .data import LayerReport, ReportData
from .depth_plots import draw_kept_energy, draw_predicted_loss
from .inline_svg import inline_svg, picture_style
from .parameter_plots import draw_accuracy, draw_loss, measured
from .plots import draw_ranks


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture and its caption.

    Attributes:
        svg: An `svg` element, safe to put into a page.
        title: What it shows.
        caption: How to read it.
        wide: Whether it needs a line of its own.
    """

    svg: str
    title: str
    caption: str
    wide: bool = False


def draw_pictures(report: ReportData, others: Sequence[ReportData] = ()) -> list[Picture]:
    """Draw all that the report has data for."""
    tooltips = {layer.name: _describe_layer(layer) for layer in report.layers}
    with picture_style():
        drawn = [
            _picture(
                "ranks",
                draw_ranks(report) if report.layers else None,
                "Ranks",
                lambda: _describe_ranks(report),
                "The rank of every layer as a share of its full rank. From the break-even rank on, factors are no "
                "smaller than the dense weight.",
                tooltips,
                wide=True,
            ),
            _picture(
                "energy",
                draw_kept_energy(report),
                "Kept energy over depth",
                lambda: _describe_energy(report),
                "What factors of these ranks keep of every layer, as the metric measures it, before compensation.",
            ),
            _picture(
                "predicted",
                draw_predicted_loss(report),
                "Predicted loss over depth",
                lambda: _describe_predicted(report),
                "What the ranks of every block are predicted to cost, before compensation.",
                tooltips,
            ),
            _picture(
                "loss",
                draw_loss(report, others),
                "Loss over parameters",
                lambda: _describe_loss(report, others),
                "What other budgets were predicted to cost. Large losses exceed the prediction; compensation "
                "lowers them.",
            ),
            _picture(
                "accuracy",
                draw_accuracy(report, others),
                "Accuracy over parameters",
                lambda: _describe_accuracy(report, others),
                "With the 95 % interval of each share on its own. Both models saw the same images, so their "
                "difference is known better than that.",
            ),
        ]
    return [picture for picture in drawn if picture is not None]


def _picture(
    name: str,
    figure: Figure | None,
    title: str,
    describe: Callable[[], str],
    caption: str,
    tooltips: Mapping[str, str] | None = None,
    wide: bool = False,
) -> Picture | None:
    if figure is None:
        return None
    return Picture(inline_svg(figure, name, title, describe(), tooltips), title, caption, wide)


def _describe_layer(layer: LayerReport) -> str:
    if layer.rank is None:
        return f"{layer.name}: {'stayed dense' if layer.targeted else 'excluded'}"
    details = [f"rank {layer.rank} of {min(layer.shape)}"]
    if layer.kept_energy is not None:
        details.append(f"{percent(layer.kept_energy, 2)} of its energy")
    if layer.predicted_loss is not None:
        details.append(f"predicted loss {layer.predicted_loss:.3g} nats")
    return f"{layer.name}: {', '.join(details)}"


def _describe_ranks(report: ReportData) -> str:
    ranks = [layer.rank for layer in report.layers if layer.rank is not None]
    dense = sum(layer.rank is None and layer.targeted for layer in report.layers)
    excluded = sum(not layer.targeted for layer in report.layers)
    spread = f" with ranks from {min(ranks)} to {max(ranks)}" if ranks else ""
    return (
        f"Of {len(report.layers)} layers {len(ranks)} are factored{spread}, {dense} stayed dense and {excluded} are "
        "excluded. The table of layers has every rank."
    )


def _describe_energy(report: ReportData) -> str:
    kept = [(layer.kept_energy, layer.name) for layer in report.layers if layer.kept_energy is not None]
    (low, lowest), (high, highest) = min(kept), max(kept)
    return f"From {percent(low, 2)} in {lowest} to {percent(high, 2)} in {highest}."


def _describe_predicted(report: ReportData) -> str:
    losses = [(layer.predicted_loss, layer.name) for layer in report.layers if layer.predicted_loss is not None]
    most, name = max(losses)
    return f"{sum(loss for loss, _ in losses):.4g} nats per image in all; most of it, {most:.3g}, in {name}."


def _describe_loss(report: ReportData, others: Sequence[ReportData]) -> str:
    budgets = [f"{format_count(each['model_parameters'])} parameters: {each['loss']:.3g}" for each in report.profile]
    points = [
        f"{format_count(each.model_parameters_after)} parameters: {found['kl']:.3g}"
        for each, found in measured((report, *others), "kl")
    ]
    sentences = {f"Predicted, in {report.loss_unit}": budgets, f"Measured KL, in {NATS}": points}
    return " ".join(f"{what}: {'; '.join(values)}." for what, values in sentences.items() if values)


def _describe_accuracy(report: ReportData, others: Sequence[ReportData]) -> str:
    points = [
        f"{format_count(each.model_parameters_after)} parameters: {percent(found['top1'], 2)}"
        for each, found in measured((report, *others), "top1")
    ]
    for _, found in measured([report], "reference_top1"):
        before = format_count(report.model_parameters_before)
        points.insert(0, f"original, {before} parameters: {percent(found['reference_top1'], 2)}")
    return f"{'; '.join(points)}."
