"""The sequential step: a layer is solved for its inputs in the compressed model."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from shapes import arrow, canvas, write

from optimum_mixrank.reporting.colours import EXCLUDED, FACTORED, GRID, INK, PAPER, SERIES


TITLE = "The sequential step"
DESCRIPTION = (
    "Above, the layers of the original model in a row. Below, the same layers compressed: the first ones are done, the "
    "next one is solved from the input of the compressed model to the target of the original model, the last ones are "
    "still to come."
)

INKS = {FACTORED: "white", SERIES[2]: PAPER}


def draw() -> Figure:
    """Draw the original above and the compressed model below; the third layer is being solved."""
    figure, axes = canvas(5.8, 2.75)
    width, height, gap = 0.72, 0.5, 0.36
    upper, lower = 1.85, 0.62

    def row(y: float, colours: list[str], words: list[str]) -> None:
        for index, (colour, word) in enumerate(zip(colours, words, strict=True)):
            x = 1.05 + index * (width + gap)
            box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06")
            box.set(facecolor=colour, edgecolor=INK, linewidth=0.8)
            axes.add_patch(box)
            ink = INKS.get(colour, INK)
            write(axes, x + width / 2, y + height / 2, word, color=ink, fontweight="bold")
            arrow(axes, (x - gap + 0.04, y + height / 2), (x - 0.04, y + height / 2))
        arrow(axes, (x + width + 0.04, y + height / 2), (x + width + gap - 0.04, y + height / 2))

    row(upper, [EXCLUDED] * 4, ["W₁", "W₂", "W₃", "W₄"])
    row(lower, [FACTORED, FACTORED, SERIES[2], GRID], ["Ŵ₁", "Ŵ₂", "Ŵ₃", "W₄"])
    write(axes, 0.08, upper + height / 2, "original", ha="left")
    write(axes, 0.08, lower + height / 2, "so far", ha="left")
    solved = 1.05 + 2 * (width + gap)
    write(axes, solved - gap / 2, lower + height + 0.02, "x′", color=SERIES[2], fontweight="bold", fontsize=12)
    target = solved + width + gap / 2
    arrow(axes, (target, upper + height / 2), (target, lower + height / 2 + 0.06), SERIES[1])
    write(axes, target + 0.14, (upper + lower + height) / 2, "t", color=SERIES[1], fontweight="bold", fontsize=12)
    write(axes, solved + width / 2, 0.28, "Ŵ₃ is fitted from x′ to t, in closed form", fontsize=9.5)
    return figure
