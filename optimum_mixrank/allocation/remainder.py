"""Spend what an allocation has left of its budget."""

from __future__ import annotations

import numpy as np

from .problem import AllocationProblem, LayerProfile


def spend_remainder(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    """Move layers to costlier options, one move at a time, by the best loss decrease per stored value, until none fits.

    Args:
        problem: Layers and budget.
        choice: Index of the option of every layer, `[layers]`, within the budget.

    Returns:
        A new choice, within the budget, to which no layer's next option could be added.
    """
    choice = choice.copy()
    left = problem.budget - sum(int(layer.option_costs[i]) for layer, i in zip(problem.layers, choice, strict=True))
    moves = [_best_move(layer, int(i), left) for layer, i in zip(problem.layers, choice, strict=True)]
    while True:
        best = max(range(len(moves)), key=lambda index: moves[index][0], default=None)
        if best is None or moves[best][1] < 0:
            return choice
        layer = problem.layers[best]
        left -= int(layer.option_costs[moves[best][1]] - layer.option_costs[choice[best]])
        choice[best] = moves[best][1]
        for index, (other, i) in enumerate(zip(problem.layers, choice, strict=True)):
            target = moves[index][1]
            # A move found earlier stays the best of its layer for as long as it fits.
            if index == best or (target >= 0 and other.option_costs[target] - other.option_costs[i] > left):
                moves[index] = _best_move(other, int(i), left)


def _best_move(layer: LayerProfile, current: int, left: int) -> tuple[float, int]:
    """Loss decrease per stored value, and the option, of the layer's best move that fits; `(-1, -1)` for none."""
    costs = layer.option_costs[current + 1 :] - layer.option_costs[current]
    fits = int(np.searchsorted(costs, left, side="right"))
    if fits == 0:
        return -1.0, -1
    gains = (layer.option_losses[current] - layer.option_losses[current + 1 : current + 1 + fits]) / costs[:fits]
    best = int(np.argmax(gains))
    return float(gains[best]), current + 1 + best
