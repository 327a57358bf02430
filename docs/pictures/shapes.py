"""Elements of schematic pictures: matrices to scale, arrows, and a canvas in inches."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from optimum_mixrank.reporting.colours import INK


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty picture whose coordinates are inches from its lower left corner."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height))
    return figure, axes


def matrix(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str, ink: str = "white"
) -> None:
    """Draw a filled rectangle with a label in the middle; `(x, y)` is its lower left corner."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    write(axes, x + width / 2, y + height / 2, label, color=ink, fontweight="bold")


def write(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Write centred text line by line, since SVG cannot centre several lines in the reader's font."""
    style = {"ha": "center", "va": "center", "fontsize": 10.5, "color": INK, **style}
    lines = text.split("\n")
    for position, line in enumerate(lines):
        axes.text(x, y + 0.2 * ((len(lines) - 1) / 2 - position), line, **style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """Draw a straight arrow."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
