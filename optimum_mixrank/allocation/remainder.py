"""Spending the remainder of a budget."""

from __future__ import annotations

import heapq

import numpy as np

from .problem import AllocationProblem, Profile


def spend_remainder(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    """Move one layer at a time to a costlier option, by the best loss decrease per stored value, until none fits.

    Ties go to the smaller move, then to the earlier layer. What cannot lower any loss is spent by `raise_evenly`.
    `choice`, the index of each layer's option, `[layers]`, must be within the budget; so is the new choice that is
    returned, in which no layer's next option would fit.
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
            # The best move of a layer stays the best for as long as it fits.
            if index == best or (target >= 0 and other.option_costs[target] - other.option_costs[i] > left):
                moves[index] = _best_move(other, int(i), left)


def raise_evenly(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    """Move one layer at a time to its next option, always the one that then keeps the smallest share, until none fits.

    Losses are ignored, and ties go to the earlier layer. For `choice` and the new choice see `spend_remainder`.
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
        # The remainder only shrinks: a step that does not fit now never will.
        if step <= left:
            left -= step
            choice[index] += 1
            push(index)
    return choice


def _best_move(layer: Profile, current: int, left: int) -> tuple[float, int]:
    """Return the loss decrease per stored value and the option of the best move that fits; `(-1, -1)` if none does."""
    costs = layer.option_costs[current + 1 :] - layer.option_costs[current]
    fits = int(np.searchsorted(costs, left, side="right"))
    if fits == 0:
        return -1.0, -1
    gains = (layer.option_losses[current] - layer.option_losses[current + 1 : current + 1 + fits]) / costs[:fits]
    best = int(np.argmax(gains))
    return float(gains[best]), current + 1 + best
