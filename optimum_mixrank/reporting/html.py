"""A report as one HTML page: figures, pictures, tables, settings and machine; it loads nothing and runs no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..evaluation.measures import MEASURES
from ..runtime.formatting import counted, format_change, format_count, format_milliseconds, format_percent
from .colours import ON_DARK
from .data import LayerReport, ReportData
from .inline_svg import css_variable
from .pictures import draw_pictures
from .reach import left_out_text, targeted_text
from .structure import describe_encoder, hidden_units, shared_factors
from .table import common_prefix, count_values, dtype_change, size_text
from .verdict import verdict


if TYPE_CHECKING:
    from jinja2 import Template

THEMES = ("light", "dark")

_TEMPLATE = "report.html.jinja"


class Headline(NamedTuple):
    """A figure at the head of the page: what it is, its value, and what to compare it with."""

    label: str
    value: str
    note: str = ""


class Row(NamedTuple):
    """A row of the table of layers."""

    name: str
    cells: Sequence[str]


def render_html(report: ReportData, others: Sequence[ReportData] = (), theme: str | None = None) -> str:
    """Return the page of a report, see `CompressionReport.to_html`."""
    if theme is not None and theme not in THEMES:
        names = ", ".join(map(repr, THEMES))
        raise ValueError(f"theme={theme!r} is unknown; choose one of {names}, or None to follow the reader's system.")
    prefix, errors = common_prefix([layer.name for layer in report.layers]), _layer_errors(report)
    return _template().render(
        theme=theme,
        light={css_variable(colour): colour for colour in ON_DARK},
        dark={css_variable(colour): on_dark for colour, on_dark in ON_DARK.items()},
        model=report.model_name or "A model",
        became=describe_encoder(report.layers),
        removed=format_percent(report.removed_of_model),
        version=report.environment.get("optimum-mixrank"),
        verdict=verdict(report),
        headlines=_measured(report.evaluation or {}) + _headlines(report),
        evaluated=report.evaluation is not None,
        pictures=draw_pictures(report, others),
        steps=_steps(report),
        prefix=prefix.removesuffix("."),
        rows=[_row(layer, prefix, report, errors) for layer in report.layers],
        repaired=bool(errors),
        totals=_totals(report),
        targeted=targeted_text(report),
        left_out=left_out_text(report),
        settings=_as_text(report.settings),
        environment=_as_text(report.environment),
        calibration=_as_text(report.calibration),
        seconds={phase: f"{seconds:,.1f} s" for phase, seconds in report.seconds.items()},
        total_seconds=f"{sum(report.seconds.values()):,.1f} s",
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Names of models, layers and settings are not to be trusted.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)


def _headlines(report: ReportData) -> list[Headline]:
    before, after = report.model_parameters_before, report.model_parameters_after
    asked = f"; {wanted}" if (wanted := size_text(report)) else ""
    figures = [Headline("parameters", f"{after:,}", f"of {before:,} ({format_change(before, after)}){asked}")]
    size, original = report.bytes_on_disk_after, report.bytes_on_disk_before
    if size is not None:
        change = (
            "" if original is None else f"of {original:,} ({format_change(original, size)}) {dtype_change(report)}"
        )
        figures.append(Headline("bytes on disk", f"{size:,}", change.rstrip()))
    if report.flops_before is not None and report.flops_after is not None:
        note = f"of {format_count(report.flops_before)} ({format_change(report.flops_before, report.flops_after)})"
        figures.append(Headline("FLOPs per image", format_count(report.flops_after), note))
    if report.latency:
        note = f"of the dense model's, {format_milliseconds(report.latency['dense_seconds'])} per batch"
        figures.append(Headline("predicted time", format_percent(report.latency["predicted_share"]), note))
    if hidden_units(report.layers):
        figures.append(Headline("hidden units", *hidden_units(report.layers).split(" ", 1)))
    if shared_factors(report.layers):
        figures.append(Headline("share first factors", *shared_factors(report.layers).split(" ", 1)))
    if report.predicted_loss is not None:
        loss = f"{report.predicted_loss:.3g} nats"
        figures.append(Headline("predicted loss", loss, "per image, before compensation"))
    return figures


def _measured(evaluation: Mapping[str, Any]) -> list[Headline]:
    figures = []
    for name in ("top1", "top5"):
        after, before = evaluation.get(name), evaluation.get(f"reference_{name}")
        if after is not None:
            points = "" if before is None else f"{100 * (after - before):+.2f}".replace("-", "−")
            note = "" if before is None else f"original {format_percent(before, 2)} ({points} points)"
            figures.append(Headline(f"top-{name.removeprefix('top')} accuracy", format_percent(after, 2), note))
    images = f"on {counted(evaluation.get('num_images', 0), 'image')}"
    for name, measure in MEASURES.items():
        if evaluation.get(name) is not None:
            value, is_share = evaluation[name], measure.form.endswith("%")
            text = format_percent(value, 2) if is_share else measure.text(value)
            figures.append(Headline(measure.title or measure.label, text, images))
    return figures


def _steps(report: ReportData) -> list[dict[str, Any]]:
    """Return the compensation steps; bar lengths are errors as percentages of the largest one."""
    largest = max((max(step["error_before"], step["error_after"]) for step in report.compensation), default=0) or 1
    return [
        {
            "name": step["name"],
            "kept": step["kept"],
            "before": f"{step['error_before']:.4g}",
            "after": f"{step['error_after']:.4g}",
            "change": format_change(step["error_before"], step["error_after"]),
            "bars": [round(100 * step[f"error_{when}"] / largest, 1) for when in ("before", "after")],
            "details": _as_text(
                {name: value for name, value in step.get("details", {}).items() if name != "layer_errors"}
            ),
        }
        for step in report.compensation
    ]


def _layer_errors(report: ReportData) -> Mapping[str, float]:
    """Return the relative errors of layers after the last layer-wise step that was kept."""
    steps = [
        step["details"]["layer_errors"]
        for step in report.compensation
        if step["kept"] and "layer_errors" in step["details"]
    ]
    return steps[-1] if steps else {}


def _row(layer: LayerReport, prefix: str, report: ReportData, errors: Mapping[str, float]) -> Row:
    predicted = report.predicted_loss
    share = layer.predicted_loss / predicted if layer.predicted_loss is not None and predicted else None
    cells = (
        layer.shape_text("×"),
        layer.rank_text,
        "" if layer.kept_energy is None else format_percent(layer.kept_energy, 2),
        "" if share is None else format_percent(share),
        *([f"{errors[layer.name]:.3g}" if layer.name in errors else ""] if errors else []),
        f"{layer.parameters_before:,}",
        f"{layer.parameters_after:,}",
        format_percent(layer.kept),
    )
    return Row(layer.name.removeprefix(prefix), cells)


def _totals(report: ReportData) -> list[Row]:
    groups = {"targeted layers": [layer for layer in report.layers if layer.targeted]}
    if not all(layer.targeted for layer in report.layers):
        groups["all linear layers of the encoder"] = list(report.layers)
    rows = []
    for name, layers in groups.items():
        factored, before, after = count_values(layers)
        kept = format_percent(after / before) if before else ""
        gap = [""] * (3 if _layer_errors(report) else 2)
        rows.append(Row(name, ("", factored, *gap, f"{before:,}", f"{after:,}", kept)))
    return rows


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as text: strings without quotes, lists and mappings as JSON."""
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
        for name, value in values.items()
    }
