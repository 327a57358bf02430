"""The ranks of a report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.rank_map import break_even
from ..checkpoint.replacing import RANKS_NAME as RANKS_NAME
from ..runtime.formatting import format_count
from .bars import TOP, TOP_WITH_UNITS, draw_layer, finish_row
from .colours import BREAK_EVEN, DENSE, EXCLUDED, FACTORED, INK, PAPER, SHARED, WIDTH
from .data import LayerReport, ReportData
from .depth import depths_of, kinds_of, label_depth
from .structure import product_shapes


if TYPE_CHECKING:
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

_LETTERS_PER_INCH = 13
"""Letters of the legend that fit into an inch."""

_FORMATS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def plot_ranks(report: ReportData, path: str | Path) -> Path:
    """Draw what every layer has become over depth, one row per kind of layer and one column per block.

    A bar shows the rank as a share of the full rank `min(m, n)` and is labelled with it. Where it is below that, a line
    across the bar marks the layout's break-even rank, from which on factors are no smaller than the dense weight. Dense and
    excluded layers have full bars in colours of their own, and so have the ranks of layers that share their first factor,
    which also have a star. Where hidden units of an MLP were removed, a box as high as the share that is left, with their
    number above it, holds the bar: the height of the box is the full rank of what is left. Layers are of one kind if their
    names differ only in numbers.

    Args:
        report: The report to draw.
        path: The file to write; its suffix gives the format: `.png`, `.svg` or `.pdf`.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the suffix is another, or the report has no layers.
    """
    from matplotlib import rc_context

    path = picture_path(path)
    with rc_context(STYLE):
        before, after = report.model_parameters_before, report.model_parameters_after
        removed = f"{report.removed_of_model:.1%} of the model removed"
        figure = draw_ranks(report, f"{format_count(before)} → {format_count(after)} parameters ({removed})")
        save_picture(figure, path)
    return path


def picture_path(path: str | Path) -> Path:
    """Return the path of a picture, whose suffix gives its format.

    Raises:
        ValueError: if it is not one of `.png`, `.svg` and `.pdf`.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path.name!r} has the suffix {path.suffix!r}; choose one of {', '.join(_FORMATS)}.")
    return path


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure, without the date, so that the same figure gives the same file."""
    form = _FORMATS[path.suffix.lower()]
    metadata: dict[str, Any] = {} if form == "png" else {"Date" if form == "svg" else "CreationDate": None}
    figure.savefig(path, format=form, metadata=metadata)


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
    shapes = product_shapes(report.layers)
    handles = _handles(report.layers, has_break_even(report))
    letters = sum(len(handle.get_label()) + 6 for handle in handles)
    columns = len(handles) if letters <= _LETTERS_PER_INCH * width else 3
    head = 0.42 if title else 0.08
    legend = 0.23 + 0.2 * -(-len(handles) // columns)
    tops = [TOP_WITH_UNITS if any(layer.kept_units < 1 for layer in layers) else TOP for layers in kinds.values()]
    height = 0.9 + head + legend + 0.95 * sum(tops) / TOP
    figure = Figure(figsize=(width, height), dpi=150)
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=tops)[:, 0].tolist()
    room = 72 * (width - 2.6) / num_slots
    for axes, top, (label, layers) in zip(rows, tops, kinds.items(), strict=True):
        for layer in layers:
            draw_layer(axes, depths[layer.name], layer, shapes[layer.name], layout, room)
        finish_row(axes, label, layers, top)
    label_depth(rows[-1], report.layers, depths, room)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, y=1 - 0.18 / height)
    figure.legend(
        handles=handles,
        # Without a title it goes to the left, where it is visible before the picture is scrolled.
        loc="upper center" if title else "upper left",
        bbox_to_anchor=(0.5 if title else 0.01, 1 - head / height),
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    top = 1 - (head + legend) / height
    figure.subplots_adjust(left=1.95 / width, right=1 - 0.3 / width, top=top, bottom=0.55 / height)
    return figure


def has_break_even(report: ReportData) -> bool:
    """Return whether factors of less than full rank can be as large as the dense weight; pivoted ones never are."""
    layout = str(report.settings.get("layout", "factors"))
    return any(break_even(*shape, layout) < min(shape) for shape in product_shapes(report.layers).values())


def _handles(layers: Sequence[LayerReport], with_break_even: bool) -> list[Any]:
    """Return the entries of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=FACTORED, label="rank, share of full rank")]
    if any(layer.members for layer in layers):
        handles.append(Patch(color=SHARED, label="* rank of a shared first factor"))
    if any(layer.kept_units < 1 for layer in layers):
        handles.append(Patch(color=WIDTH, label="hidden units kept, number above"))
    if any(layer.rank is None and layer.targeted for layer in layers):
        handles.append(Patch(color=DENSE, label="dense"))
    if any(layer.rank is None and not layer.targeted for layer in layers):
        handles.append(Patch(facecolor=EXCLUDED, hatch="////", edgecolor=PAPER, label="excluded, dense"))
    if with_break_even:
        handles.append(Line2D([], [], color=BREAK_EVEN, linewidth=1.3, label="break-even rank"))
    return handles
