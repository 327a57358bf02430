"""Spend what an allocation has left of its budget."""

from __future__ import annotations

import heapq

import numpy as np

from .problem import AllocationProblem, LayerProfile


def spend_remainder(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    """Move layers to costlier options, one at a time, by the best loss decrease per stored value, until none fits.

    Ties go to the smaller move, then to the earlier layer. What cannot lower any loss is spent by `raise_evenly`.

    Args:
        problem: Layers and budget.
        choice: Index of the option of every layer, `[layers]`, within the budget.

    Returns:
        A new choice, within the budget, to which no layer's next option could be added.
    """
    choice = choice.copy()
    left = problem.left(choice)
    moves = [_best_move(layer, int(i), left) for layer, i in zip(problem.layers, choice, strict=True)]
    while True:
        best = max(range(len(moves)), key=lambda index: moves[index][0], default=None)
        if best is None or moves[best][0] <= 0:
            return raise_evenly(problem, choice)
        layer = problem.layers[best]
        left -= int(layer.option_costs[moves[best][1]] - layer.option_costs[choice[best]])
        choice[best] = moves[best][1]
        for index, (other, i) in enumerate(zip(problem.layers, choice, strict=True)):
            target = moves[index][1]
            # A move found earlier stays the best of its layer for as long as it fits.
            if index == best or (target >= 0 and other.option_costs[target] - other.option_costs[i] > left):
                moves[index] = _best_move(other, int(i), left)


def raise_evenly(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    """Move layers to their next option, one at a time, the one that then keeps the least share first, until none fits.

    Losses play no part. Ties go to the earlier layer.

    Args:
        problem: Layers and budget.
        choice: Index of the option of every layer, `[layers]`, within the budget.

    Returns:
        A new choice, within the budget, to which no layer's next option could be added.
    """
    choice = choice.copy()
    left = problem.left(choice)
    upcoming: list[tuple[float, int]] = []

    def push(index: int) -> None:
        layer, target = problem.layers[index], int(choice[index]) + 1
        if target < len(layer.options):
            heapq.heappush(upcoming, (float(layer.option_costs[target]) / layer.dense_cost, index))

    for index in range(len(problem.layers)):
        push(index)
    while upcoming:
        _, index = heapq.heappop(upcoming)
        costs = problem.layers[index].option_costs
        step = int(costs[choice[index] + 1] - costs[choice[index]])
        # What is left only shrinks: a step that does not fit now never will.
        if step <= left:
            left -= step
            choice[index] += 1
            push(index)
    return choice


def _best_move(layer: LayerProfile, current: int, left: int) -> tuple[float, int]:
    """Loss decrease per stored value, and the option, of the layer's best move that fits; `(-1, -1)` for none."""
    costs = layer.option_costs[current + 1 :] - layer.option_costs[current]
    fits = int(np.searchsorted(costs, left, side="right"))
    if fits == 0:
        return -1.0, -1
    gains = (layer.option_losses[current] - layer.option_losses[current + 1 : current + 1 + fits]) / costs[:fits]
    best = int(np.argmax(gains))
    return float(gains[best]), current + 1 + best
