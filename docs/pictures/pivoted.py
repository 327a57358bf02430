"""What the pivoted layout stores."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from shapes import canvas, write

from optimum_mixrank.checkpoint.rank_map import stored_values
from optimum_mixrank.reporting.colours import EXCLUDED, FACTORED, PAPER, SERIES


TITLE = "The pivoted layout"
DESCRIPTION = (
    "Of a product with 8 rows and rank 3, three pivot rows are stored as they are, and for each of the five other rows "
    "the three coefficients with which it is combined from them."
)

ROWS, COLUMNS, PIVOTS = 8, 8, (1, 4, 6)
CELL = 0.23


def draw() -> Figure:
    """Draw a product of rank 3: its pivot rows, and the other rows as combinations of them."""
    figure, axes = canvas(5.8, 2.9)
    bottom, rank = 0.62, len(PIVOTS)
    others = [row for row in range(ROWS) if row not in PIVOTS]

    def cell(x: float, y: float, column: int, row: float, colour: str) -> None:
        corner = (x + column * CELL, y - (row + 1) * CELL)
        axes.add_patch(Rectangle(corner, CELL, CELL, facecolor=colour, edgecolor=PAPER, linewidth=1.2))

    top = bottom + ROWS * CELL
    for row in range(ROWS):
        for column in range(COLUMNS):
            cell(0.3, top, column, row, FACTORED if row in PIVOTS else EXCLUDED)
    write(axes, 0.3 + COLUMNS * CELL / 2, top + 0.18, "Ŵ, rank 3")
    write(axes, 2.5, bottom + ROWS * CELL / 2, "=", fontsize=18)
    left = 2.85
    for row in range(rank):
        for column in range(COLUMNS):
            cell(left, top, column, row, FACTORED)
    write(axes, left + COLUMNS * CELL / 2, top + 0.18, "A: the pivot rows")
    for row in range(len(others)):
        for column in range(rank):
            cell(left, top - (rank + 0.9) * CELL, column, row - 0.5, SERIES[1])
    x = left + rank * CELL + 0.15
    write(axes, x, top - (rank + 2.3) * CELL, "C: how the other rows", ha="left", fontsize=9.5)
    write(axes, x, top - (rank + 3.2) * CELL, "are combined from them", ha="left", fontsize=9.5)
    factors = stored_values(ROWS, COLUMNS, rank, "factors")
    pivoted = stored_values(ROWS, COLUMNS, rank, "pivoted")
    write(axes, 0.3 + COLUMNS * CELL / 2, 0.3, f"two factors: {factors} values", fontsize=9.5)
    write(axes, left + 1.3, 0.3, f"r (m + n) − r² = {pivoted} values, exactly the same Ŵ", fontsize=9.5)
    return figure
