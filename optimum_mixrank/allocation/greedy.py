"""The paper's gradual greedy rank search."""

from __future__ import annotations

import math

import numpy as np

from .allocator import ALLOCATORS, Allocator
from .problem import AllocationProblem, RankAllocation
from .remainder import spend_remainder


@ALLOCATORS.register
class GreedyAllocator(Allocator):
    """Gradual greedy search (arXiv 2402.06004).

    All layers start at their break-even rank, which costs what the dense layer does. The number of values to keep
    falls as `τ(t) = N_target + (N_0 - N_target) exp(-t / gamma)`. At step t every layer is asked for the rank at which
    it alone would give up the values that are still above `τ(t)`, `r' = ⌊r - Δ / (m + n)⌋`, bounded below by its
    smallest rank; the layer whose loss at `r'` is the lowest is shrunk, the earlier one of equals. After the last step
    the search goes on with `τ = N_target` until the budget holds; then the remainder is spent by best return.

    Args:
        gamma: Time constant of the schedule, in steps.
        max_steps: Length of the schedule.
    """

    name = "greedy"

    def __init__(self, gamma: float = 80.0, max_steps: int = 500) -> None:
        self.gamma = gamma
        self.max_steps = max_steps

    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """See `Allocator.allocate`."""
        problem.check()
        layers = problem.layers
        # The last option is the dense layer (or the one rank that the user fixed).
        choice = np.array([len(layer.options) - 1 for layer in layers], dtype=np.int64)
        cost = start = sum(int(layer.option_costs[-1]) for layer in layers)
        step = 0
        while cost > problem.budget:
            step += 1
            remaining = math.exp(-step / self.gamma) if step <= self.max_steps else 0.0
            surplus = cost - (problem.budget + (start - problem.budget) * remaining)
            if surplus <= 0:
                continue
            best, best_index, best_loss = -1, -1, math.inf
            for position, layer in enumerate(layers):
                current = int(choice[position])
                if current == 0:
                    continue
                allowed = layer.option_costs[current] - surplus
                index = int(np.searchsorted(layer.option_costs[:current], allowed, side="right")) - 1
                index = max(index, 0)
                if layer.option_losses[index] < best_loss:
                    best, best_index, best_loss = position, index, float(layer.option_losses[index])
            cost -= int(layers[best].option_costs[choice[best]] - layers[best].option_costs[best_index])
            choice[best] = best_index
        return problem.to_ranks(spend_remainder(problem, choice))
