"""Tables of latencies that follow a formula, so that nothing has to be timed."""

from __future__ import annotations

from optimum_mixrank.allocation.latency import LatencyTable, LayerTimes, RankTimes
from optimum_mixrank.checkpoint.rank_map import break_even, stored_values


PRODUCT = 2e-6
"""Seconds that every product takes, however small."""

VALUE = 1e-8
"""Seconds per stored value and token."""


def dense_seconds(m: int, n: int, tokens: int, members: int = 1) -> float:
    """Return the seconds of a dense layer, or of several with the same input."""
    return members * PRODUCT + VALUE * tokens * m * n


def factored_seconds(m: int, n: int, rank: int, tokens: int, layout: str = "pivoted") -> float:
    """Return the seconds of a factored layer."""
    return 2 * PRODUCT + VALUE * tokens * stored_values(m, n, rank, layout)


def layer_times(
    m: int, n: int, tokens: int, count: int, side: str = "", members: int = 1, step: int = 1
) -> LayerTimes:
    """Return the times of layers of a shape, at every size and rank, or at those that are multiples of `step`."""
    full = n if side == "in" else m
    sizes = tuple(size for size in range(1, full + 1) if size % step == 0 or size == full) if side else (full,)
    shapes = [(m, size) if side == "in" else (size, n) for size in sizes]
    dense = tuple(dense_seconds(*shape, tokens, members) for shape in shapes)
    factored = {}
    for layout in ("factors", "pivoted"):
        curves = []
        for rows, columns in shapes:
            largest = max(1, int(break_even(rows, columns, layout)))
            ranks = tuple(rank for rank in range(1, largest + 1) if rank % step == 0 or rank in (1, largest))
            curves.append(
                RankTimes(ranks, tuple(factored_seconds(rows, columns, rank, tokens, layout) for rank in ranks))
            )
        factored[layout] = tuple(curves)
    return LayerTimes(m, n, tokens, members, count, side, sizes, dense, factored)


def block_table(
    width: int = 32, hidden: int = 64, tokens: int = 17, blocks: int = 2, step: int = 1, rank_multiple: int = 1
) -> LatencyTable:
    """Return the table of a ViT with these sizes; a third of its time goes to everything but its linear layers."""
    layers = (
        layer_times(width, width, tokens, 4 * blocks, step=step),
        layer_times(hidden, width, tokens, blocks, "out", step=step),
        layer_times(width, hidden, tokens, blocks, "in", step=step),
        layer_times(3 * width, width, tokens, blocks, members=3, step=step),
    )
    alone = sum(layer.count * layer.dense[-1] for layer in layers if layer.members == 1)
    conditions = {"device": "cpu", "threads": 1, "dtype": "float32", "batch_size": 1, "runtime": "eager"}
    return LatencyTable(1.5 * alone, 0.5 * alone, layers, rank_multiple, conditions)
