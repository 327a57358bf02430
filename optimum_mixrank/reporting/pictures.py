"""The pictures of a report's page, each with a text that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..allocation.profile import NATS
from ..runtime.formatting import format_count, format_percent
from .data import LayerReport, ReportData
from .depth_plots import draw_kept_energy, draw_predicted_loss
from .inline_svg import inline_svg, picture_style
from .parameter_plots import draw_accuracy, draw_loss, measured
from .plots import draw_ranks, has_break_even
from .structure import hidden_units, product_shapes, shared_factors


@dataclass(frozen=True)
class Picture:
    """A picture with its title and caption; `svg` is safe to put into a page, `wide` gives it a row of its own."""

    svg: str
    title: str
    caption: str
    wide: bool


def draw_pictures(report: ReportData, others: Sequence[ReportData] = ()) -> list[Picture]:
    """Draw every picture for which the report has data."""
    reports = [report, *others]
    with picture_style():
        drawn = [
            (
                draw_ranks(report) if report.layers else None,
                _describe_ranks,
                "Ranks",
                _caption_of_ranks(report),
            ),
            (
                draw_kept_energy(report),
                _describe_energy,
                "Kept energy over depth",
                "What factors of these ranks keep of every layer, as the metric measures it, before compensation.",
            ),
            (
                draw_predicted_loss(report),
                _describe_predicted,
                "Predicted loss over depth",
                "What the ranks of every block are predicted to cost, before compensation.",
            ),
            (
                draw_loss(report, others),
                _describe_loss,
                "Loss over parameters",
                "What other budgets were predicted to cost. Large losses exceed the prediction; compensation "
                "lowers them.",
            ),
            (
                draw_accuracy(report, others),
                _describe_accuracy,
                "Accuracy over parameters",
                "With the 95 % interval of each share on its own. Both models saw the same images, so their "
                "difference is known more precisely.",
            ),
        ]
        names = ("ranks", "energy", "predicted", "loss", "accuracy")
        products = product_shapes(report.layers)
        tooltips = {layer.name: _describe_layer(layer, products[layer.name]) for layer in report.layers}
        return [
            Picture(inline_svg(figure, name, title, describe(reports), tooltips), title, caption, name == "ranks")
            for name, (figure, describe, title, caption) in zip(names, drawn, strict=True)
            if figure is not None
        ]


def _caption_of_ranks(report: ReportData) -> str:
    sentences = ["The rank of every layer as a share of its full rank."]
    if has_break_even(report):
        sentences.append("From the break-even rank on, factors are no smaller than the dense weight.")
    if shared_factors(report.layers):
        sentences.append("Layers of a block that share their first factor have one rank.")
    if hidden_units(report.layers):
        sentences.append(
            "Where hidden units were removed, the box around a bar is as high as the share of them that is left, and a "
            "bar that fills it has the full rank of what is left."
        )
    return " ".join(sentences)


def _describe_layer(layer: LayerReport, product: tuple[int, int]) -> str:
    narrow = f"{format_percent(layer.kept_units)} of the hidden units" if layer.kept_units < 1 else ""
    if layer.rank is None:
        kind = "dense" if narrow else "stayed dense" if layer.targeted else "excluded"
        return f"{layer.name}: {', '.join(filter(None, (kind, narrow)))}"
    details = [f"rank {layer.rank} of {min(product)}", narrow]
    if layer.members:
        details.append(f"first factor shared by {len(layer.members)} layers")
    details = [detail for detail in details if detail]
    if layer.kept_energy is not None:
        details.append(f"{format_percent(layer.kept_energy, 2)} of its energy")
    if layer.predicted_loss is not None:
        details.append(f"predicted loss {layer.predicted_loss:.3g} nats")
    return f"{layer.name}: {', '.join(details)}"


def _describe_ranks(reports: Sequence[ReportData]) -> str:
    layers = reports[0].layers
    ranks = [layer.rank for layer in layers if layer.rank is not None]
    dense = sum(layer.rank is None and layer.targeted for layer in layers)
    excluded = sum(not layer.targeted for layer in layers)
    spread = f" with ranks from {min(ranks)} to {max(ranks)}" if ranks else ""
    sentences = [
        f"Of {len(layers)} layers {len(ranks)} are factored{spread}, {dense} are dense and {excluded} excluded."
    ]
    if shared_factors(layers):
        sentences.append(f"{shared_factors(layers)} share their first factor.")
    if hidden_units(layers):
        sentences.append(f"Hidden units kept: {hidden_units(layers)}.")
    return " ".join([*sentences, "The table of layers has every rank."])


def _describe_energy(reports: Sequence[ReportData]) -> str:
    kept = [(layer.kept_energy, layer.name) for layer in reports[0].layers if layer.kept_energy is not None]
    (low, lowest), (high, highest) = min(kept), max(kept)
    return f"From {format_percent(low, 2)} in {lowest} to {format_percent(high, 2)} in {highest}."


def _describe_predicted(reports: Sequence[ReportData]) -> str:
    losses = [(layer.predicted_loss, layer.name) for layer in reports[0].layers if layer.predicted_loss is not None]
    most, name = max(losses)
    return f"{sum(loss for loss, _ in losses):.4g} nats per image in all; most of it, {most:.3g}, in {name}."


def _describe_loss(reports: Sequence[ReportData]) -> str:
    budgets = [_at(each["model_parameters"], f"{each['loss']:.3g}") for each in reports[0].profile]
    points = [_at(each.model_parameters_after, f"{found['kl']:.3g}") for each, found in measured(reports, "kl")]
    sentences = {f"Predicted, in {reports[0].loss_unit}": budgets, f"Measured KL, in {NATS}": points}
    return " ".join(f"{what}: {'; '.join(values)}." for what, values in sentences.items() if values)


def _describe_accuracy(reports: Sequence[ReportData]) -> str:
    points = [
        _at(each.model_parameters_after, format_percent(found["top1"], 2)) for each, found in measured(reports, "top1")
    ]
    for each, found in measured(reports[:1], "reference_top1"):
        points.insert(0, f"original, {_at(each.model_parameters_before, format_percent(found['reference_top1'], 2))}")
    return f"{'; '.join(points)}."


def _at(parameters: int, value: str) -> str:
    return f"{format_count(parameters)} parameters: {value}"
