"""A dense weight and its two factors, to scale."""

from __future__ import annotations

from matplotlib.figure import Figure
from shapes import canvas, matrix, write

from optimum_mixrank.checkpoint.rank_map import stored_values
from optimum_mixrank.reporting.colours import EXCLUDED, FACTORED, INK


TITLE = "A dense weight and its two factors"
DESCRIPTION = (
    "A square of 768 by 768 values is replaced by a tall factor B of 768 by 192 and a wide factor A of 192 by 768, "
    "which together hold half as many values."
)

SIZE, RANK = 768, 192


def draw() -> Figure:
    """Draw how `y = W x + b` becomes `y = B (A x) + b`."""
    scale = 1.75 / SIZE
    side, rank = SIZE * scale, RANK * scale
    figure, axes = canvas(5.8, 2.75)
    bottom = 0.55
    matrix(axes, 0.35, bottom, side, side, EXCLUDED, "W", INK)
    write(axes, 0.35 + side / 2, bottom + side + 0.16, f"n = {SIZE}", fontsize=9)
    write(axes, 0.18, bottom + side / 2, f"m = {SIZE}", fontsize=9, rotation=90)
    write(axes, 2.5, bottom + side / 2, "≈", fontsize=20)
    matrix(axes, 2.95, bottom, rank, side, FACTORED, "B")
    write(axes, 2.95 + rank / 2, bottom + side + 0.16, f"r = {RANK}", fontsize=9)
    write(axes, 3.62, bottom + side / 2, "·", fontsize=20)
    matrix(axes, 3.85, bottom + (side - rank) / 2, side, rank, FACTORED, "A")
    dense, factors = SIZE * SIZE, stored_values(SIZE, SIZE, RANK, "factors")
    write(axes, 0.35 + side / 2, 0.25, f"m n = {dense:,} values", fontsize=9.5)
    write(axes, 4.25, 0.25, f"r (m + n) = {factors:,} values ({100 * factors / dense:.0f} %)", fontsize=9.5)
    return figure
