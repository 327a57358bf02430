"""The ranks of a report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.rank_map import break_even
from ..checkpoint.replacing import RANKS_NAME as RANKS_NAME
from ..runtime.formatting import format_count
from .colours import BREAK_EVEN, DENSE, EXCLUDED, FACTORED, GRID, INK, PAPER, SHARED, WIDTH
from .data import LayerReport, ReportData
from .depth import depths_of, kinds_of, label_depth


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    # The same report gives the same file.
    "svg.hashsalt": "mixrank",
    # Names of layers are not formulas.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "hatch.linewidth": 0.6,
}
"""matplotlib settings for drawing and saving."""

_NARROWEST_LABELLED = 12
"""Width in points that a bar needs to be labelled with its rank, upright if necessary."""

_MOST_IN_A_ROW = 4
"""Entries of the legend that fit into one row of the narrowest picture."""

_FORMATS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def plot_ranks(report: ReportData, path: str | Path) -> Path:
    """Draw the rank of every layer over depth, one row per kind of layer.

    A bar shows the rank as a share of the full rank `min(m, n)` and is labelled with it. A line across the bar marks
    the layout's break-even rank, from which on factors are no smaller than the dense weight. Dense and excluded layers
    have full bars in colours of their own. Layers are of one kind if their names differ only in numbers.

    Args:
        report: The report to draw.
        path: The file to write; its suffix gives the format: `.png`, `.svg` or `.pdf`.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the suffix is another, or the report has no layers.
    """
    from matplotlib import rc_context

    path = Path(path)
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path.name!r} has the suffix {path.suffix!r}; choose one of {', '.join(_FORMATS)}.")
    with rc_context(STYLE):
        before, after = report.model_parameters_before, report.model_parameters_after
        removed = f"{report.removed_of_model:.1%} of the model removed"
        figure = draw_ranks(report, f"{format_count(before)} → {format_count(after)} parameters ({removed})")
        metadata: dict[str, Any] = {} if form == "png" else {"Date" if form == "svg" else "CreationDate": None}
        figure.savefig(path, format=form, metadata=metadata)
    return path


def draw_ranks(report: ReportData, title: str | None = None) -> Figure:
    """Return the picture that `plot_ranks` saves; the `gid` of every bar is its layer's name.

    Raises:
        ValueError: if the report has no layers.
    """
    # matplotlib takes a while to import; figures made without pyplot need no display and leave no global state.
    from matplotlib.figure import Figure

    if not report.layers:
        raise ValueError("The report has no layer to draw.")
    layout = str(report.settings.get("layout", "factors"))
    depths = depths_of(report.layers)
    kinds = kinds_of(report.layers)
    num_slots = max(depths.values()) + 1
    width = min(max(2.6 + 0.42 * num_slots, 7.0), 24.0)
    head = 0.42 if title else 0.08
    height = 1.33 + head + 0.95 * len(kinds)
    figure = Figure(figsize=(width, height), dpi=150)
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0].tolist()
    room = 72 * (width - 2.6) / num_slots
    for axes, (label, layers) in zip(rows, kinds.items(), strict=True):
        _draw_kind(axes, label, [(depths[layer.name], layer) for layer in layers], room, layout)
    label_depth(rows[-1], report.layers, depths, room)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, y=1 - 0.18 / height)
    # Without a title it goes to the left, where it is visible before the picture is scrolled.
    _add_legend(figure, report.layers, y=1 - head / height, left=title is None)
    second_row = 0.2 if len(_handles(report.layers)) > _MOST_IN_A_ROW else 0.0
    top = 1 - (head + 0.43 + second_row) / height
    figure.subplots_adjust(left=1.95 / width, right=1 - 0.3 / width, top=top, bottom=0.55 / height)
    return figure


def _draw_kind(axes: Axes, label: str, layers: Sequence[tuple[int, LayerReport]], room: float, layout: str) -> None:
    """Draw one row of bars with their break-even lines; `room` is the width of a slot in points."""
    for depth, layer in layers:
        m, n = layer.shape
        full = min(m, n)
        limit = break_even(m, n, layout) / full
        axes.hlines(limit, depth - 0.42, depth + 0.42, color=BREAK_EVEN, linewidth=1.3, zorder=3)
        share, text, colour = 1.0, "excl.", EXCLUDED
        if layer.rank is not None:
            share, text, colour = layer.rank / full, str(layer.rank), SHARED if layer.members else FACTORED
        elif layer.targeted:
            text, colour = "dense", DENSE
        hatch = "////" if colour == EXCLUDED else None
        (bar,) = axes.bar(depth, share, width=0.72, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0, zorder=2)
        bar.set_gid(layer.name)
        if layer.kept_units < 1:
            # Behind the rank, and wider, so that both are seen whichever is higher.
            axes.bar(depth, layer.kept_units, width=0.86, color=WIDTH, linewidth=0, zorder=1)
        if room >= _NARROWEST_LABELLED:
            _write_on_bar(axes, depth, share, text, light=layer.rank is not None, upright=len(text) * 5.4 > room)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=7)
    axes.grid(axis="y", color=GRID, linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, colors=INK)
    lines = [label, *_shapes([layer for _, layer in layers])]
    for position, line in enumerate(lines):
        # One line at a time: SVG cannot right-align several lines in the reader's font.
        axes.annotate(
            line,
            xy=(0, 0.5),
            xytext=(-33, 11 * ((len(lines) - 1) / 2 - position)),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )


def _write_on_bar(axes: Axes, depth: int, share: float, text: str, light: bool, upright: bool) -> None:
    """Label a bar at its top end, or above it if it is too short, so that no label meets a break-even line."""
    inside = share > (0.36 if upright else 0.2)
    # The break-even line crosses the full bars of dense layers; their label goes below it.
    head = share if light else 0.3
    axes.text(
        depth,
        head - 0.04 if inside else head + 0.04,
        text,
        ha="center",
        va="top" if inside else "bottom",
        rotation=90 if upright else 0,
        fontsize=7.5,
        color="white" if inside and light else INK,
        zorder=4,
    )


def _shapes(layers: Sequence[LayerReport]) -> list[str]:
    shapes = list(dict.fromkeys(f"{layer.shape[0]} x {layer.shape[1]}" for layer in layers))
    return shapes if len(shapes) == 1 else [f"{shapes[0]} …", shapes[-1]]


def _handles(layers: Sequence[LayerReport]) -> list[Any]:
    """Return the entries of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=FACTORED, label="rank, share of full rank")]
    if any(layer.members for layer in layers):
        handles.append(Patch(color=SHARED, label="rank of a shared first factor"))
    if any(layer.kept_units < 1 for layer in layers):
        handles.append(Patch(color=WIDTH, label="hidden units kept"))
    if any(layer.rank is None and layer.targeted for layer in layers):
        handles.append(Patch(color=DENSE, label="stayed dense"))
    if any(layer.rank is None and not layer.targeted for layer in layers):
        handles.append(Patch(facecolor=EXCLUDED, hatch="////", edgecolor=PAPER, label="excluded, dense"))
    handles.append(Line2D([], [], color=BREAK_EVEN, linewidth=1.3, label="break-even rank"))
    return handles


def _add_legend(figure: Figure, layers: Sequence[LayerReport], y: float, left: bool) -> None:
    handles = _handles(layers)
    figure.legend(
        handles=handles,
        loc="upper left" if left else "upper center",
        bbox_to_anchor=(0.01 if left else 0.5, y),
        ncols=len(handles) if len(handles) <= _MOST_IN_A_ROW else _MOST_IN_A_ROW - 1,
        frameon=False,
        fontsize=8,
    )
