"""A row of bars in the picture of ranks: what the layers of one kind have become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoint.rank_map import break_even
from .colours import BREAK_EVEN, DENSE, EXCLUDED, FACTORED, GRID, INK, PAPER, SHARED, UNITS, WIDTH
from .data import LayerReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP, TOP_WITH_UNITS = 1.08, 1.34
"""The upper end of a row, in full bars; with a line of numbers above the bars."""

_REACH = 0.42
"""Half of the width of a box of hidden units and of a break-even line, in slots."""

_LINE = 0.2
"""Height that a label needs, in full bars."""

_NARROWEST_LABELLED = 12
"""Width in points that a bar needs to be labelled with its rank, upright if necessary."""


def draw_layer(axes: Axes, depth: int, layer: LayerReport, product: tuple[int, int], layout: str, room: float) -> None:
    """Draw the bar of a layer, its box of hidden units and its break-even line.

    Args:
        axes: The row.
        depth: The slot.
        layer: The layer.
        product: Shape of the matrix that its rank belongs to; see `product_shapes`.
        layout: The layout of the factors.
        room: Width of a slot in points.
    """
    full, box = min(product), layer.kept_units
    limit = box * break_even(*product, layout) / full
    share, text, colour = box, "excl.", EXCLUDED
    if layer.rank is not None:
        share, text, colour = box * layer.rank / full, str(layer.rank), FACTORED
        if layer.members:
            # The star tells them apart without colours.
            text, colour = f"{text}*", SHARED
    elif layer.targeted:
        text, colour = "dense", DENSE
    hatch = "////" if colour == EXCLUDED else None
    (bar,) = axes.bar(depth, share, width=0.72, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0, zorder=2)
    bar.set_gid(layer.name)
    if limit < box:
        axes.hlines(limit, depth - _REACH, depth + _REACH, color=BREAK_EVEN, linewidth=1.3, zorder=3)
    if box < 1:
        # Wider than the bar, so that it is seen where the bar fills it.
        axes.bar(depth, box, width=2 * _REACH, color=WIDTH, linewidth=0, zorder=1)
    if room < _NARROWEST_LABELLED:
        return
    _write_on_bar(axes, depth, (share, limit), text, light=layer.rank is not None, upright=_is_upright(text, room))
    if box < 1:
        units = str(min(zip(layer.shape_after or layer.shape, layer.shape, strict=True), key=_ratio)[0])
        angle = 90 if _is_upright(units, room) else 0
        axes.text(depth, TOP, units, ha="center", va="bottom", rotation=angle, fontsize=7.5, color=UNITS)


def finish_row(axes: Axes, label: str, layers: Sequence[LayerReport], top: float) -> None:
    """Label a row and scale its axis up to `top`."""
    axes.set_ylim(0, top)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=7)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, colors=INK)
    lines = [label, *_shapes(layers)]
    for position, line in enumerate(lines):
        # One line at a time: SVG cannot right-align several lines in the reader's font.
        axes.annotate(
            line,
            xy=(0, 0.5 / top),
            xytext=(-33, 11 * ((len(lines) - 1) / 2 - position)),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )


def _ratio(sizes: tuple[int, int]) -> float:
    return sizes[0] / sizes[1]


def _is_upright(text: str, room: float) -> bool:
    return len(text) * 5.4 > room


def _write_on_bar(axes: Axes, depth: int, heights: tuple[float, float], text: str, light: bool, upright: bool) -> None:
    """Label a bar at its top end, or above it if it is too short, so that no label meets a break-even line."""
    share, limit = heights
    inside = share > (0.36 if upright else _LINE)
    # The break-even line crosses the full bars of dense layers; their label goes below it.
    head = share if light else 0.3
    if not inside and limit < head + _LINE:
        head = max(head, limit)
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
