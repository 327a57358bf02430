"""A report as one HTML page: figures, pictures, tables, settings and machine; nothing is loaded, no script runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.formatting import change, format_count, percent
from .colours import ON_DARK
from .data import LayerReport, ReportData
from .inline_svg import css_variable
from .pictures import draw_pictures
from .table import common_prefix, dtype_change


if TYPE_CHECKING:
    from jinja2 import Template

THEMES = ("light", "dark")

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Headline:
    """A figure at the head of the page: what it is, its value, and what that compares with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table of layers."""

    name: str
    cells: Sequence[str]


def render_html(report: ReportData, others: Sequence[ReportData] = (), theme: str | None = None) -> str:
    """See `ReportData.to_html`."""
    if theme is not None and theme not in THEMES:
        names = ", ".join(map(repr, THEMES))
        raise ValueError(f"theme={theme!r} is unknown; choose one of {names}, or None to follow the reader's system.")
    prefix = common_prefix([layer.name for layer in report.layers])
    return _template().render(
        theme=theme,
        light={css_variable(colour): colour for colour in ON_DARK},
        dark={css_variable(colour): on_dark for colour, on_dark in ON_DARK.items()},
        model=report.model_name or "A model",
        removed=percent(report.removed_of_model),
        version=report.environment.get("optimum-mixrank"),
        headlines=_headlines(report),
        evaluated=report.evaluation is not None,
        pictures=draw_pictures(report, others),
        steps=_steps(report),
        prefix=prefix.removesuffix("."),
        rows=[_row(layer, layer.name.removeprefix(prefix), report.predicted_loss) for layer in report.layers],
        totals=_totals(report),
        settings=_shown(report.settings),
        environment=_shown(report.environment),
        calibration=_shown(report.calibration),
        seconds={phase: f"{seconds:,.1f} s" for phase, seconds in report.seconds.items()},
        total_seconds=f"{sum(report.seconds.values()):,.1f} s",
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Names of models, layers and settings come from anywhere.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)


def _headlines(report: ReportData) -> list[Headline]:
    before, after = report.model_parameters_before, report.model_parameters_after
    figures = [Headline("parameters", f"{after:,}", f"of {before:,} ({change(before, after)})")]
    size = report.bytes_on_disk_after
    if size is not None:
        original = report.bytes_on_disk_before
        note = (
            "" if original is None else f"of {original:,} ({change(original, size)}) {dtype_change(report)}".rstrip()
        )
        figures.append(Headline("bytes on disk", f"{size:,}", note))
    if report.flops_before is not None and report.flops_after is not None:
        note = f"of {format_count(report.flops_before)} ({change(report.flops_before, report.flops_after)})"
        figures.append(Headline("FLOPs per image", format_count(report.flops_after), note))
    if report.predicted_loss is not None:
        figures.append(
            Headline("predicted loss", f"{report.predicted_loss:.3g} nats", "per image, before compensation")
        )
    return figures + _measured(report.evaluation or {})


def _measured(evaluation: Mapping[str, Any]) -> list[Headline]:
    figures = []
    for name in ("top1", "top5"):
        after, before = evaluation.get(name), evaluation.get(f"reference_{name}")
        if after is not None:
            points = "" if before is None else f"{100 * (after - before):+.2f}".replace("-", "−")
            note = "" if before is None else f"original {percent(before, 2)} ({points} points)"
            figures.append(Headline(f"top-{name.removeprefix('top')} accuracy", percent(after, 2), note))
    images = f"on {evaluation.get('num_images', 0):,} images"
    if evaluation.get("agreement") is not None:
        figures.append(Headline("agreement with the original", percent(evaluation["agreement"], 2), images))
    if evaluation.get("kl") is not None:
        figures.append(Headline("KL from the original", f"{evaluation['kl']:.4f} nats", images))
    if evaluation.get("feature_error") is not None:
        figures.append(Headline("relative error of the features", f"{evaluation['feature_error']:.4g}", images))
    return figures


def _steps(report: ReportData) -> list[dict[str, Any]]:
    """Steps of compensation, with the errors as lengths of bars too, in percent of the largest."""
    largest = max((max(step["error_before"], step["error_after"]) for step in report.compensation), default=0) or 1
    return [
        {
            "name": step["name"],
            "kept": step["kept"],
            "before": f"{step['error_before']:.4g}",
            "after": f"{step['error_after']:.4g}",
            "change": change(step["error_before"], step["error_after"]),
            "bars": [round(100 * step[f"error_{when}"] / largest, 1) for when in ("before", "after")],
            "details": _shown(step.get("details", {})),
        }
        for step in report.compensation
    ]


def _row(layer: LayerReport, name: str, predicted: float | None) -> Row:
    rank = "dense" if layer.targeted else "excluded"
    share = layer.predicted_loss / predicted if layer.predicted_loss is not None and predicted else None
    return Row(
        name,
        (
            f"{layer.shape[0]} × {layer.shape[1]}",
            rank if layer.rank is None else str(layer.rank),
            "" if layer.kept_energy is None else percent(layer.kept_energy, 2),
            "" if share is None else percent(share),
            f"{layer.parameters_before:,}",
            f"{layer.parameters_after:,}",
            percent(layer.kept),
        ),
    )


def _totals(report: ReportData) -> list[Row]:
    groups = {"targeted layers": [layer for layer in report.layers if layer.targeted]}
    if not all(layer.targeted for layer in report.layers):
        groups["all linear layers of the encoder"] = list(report.layers)
    return [_total(name, layers) for name, layers in groups.items()]


def _total(name: str, layers: Sequence[LayerReport]) -> Row:
    before = sum(layer.parameters_before for layer in layers)
    after = sum(layer.parameters_after for layer in layers)
    return Row(
        name,
        (
            "",
            f"{sum(layer.rank is not None for layer in layers)} of {len(layers)}",
            "",
            "",
            f"{before:,}",
            f"{after:,}",
            percent(after / before) if before else "",
        ),
    )


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as one would write them, text without quotes."""
    return {name: value if isinstance(value, str) else _literal(value) for name, value in values.items()}


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
