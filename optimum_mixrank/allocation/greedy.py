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

    All layers start dense, which costs as much as their break-even rank. The number of values to keep falls as
    `τ(t) = N_target + (N_0 - N_target) exp(-t / gamma)`. At step t, let `Δ` be the excess of the stored values over
    `τ(t)` and `r' = ⌊r - Δ / (m + n)⌋`, bounded below by the smallest rank, the rank at which a layer alone would remove
    it. The layer whose loss at `r'` is the lowest shrinks to it; ties go to the earlier layer. After the last step the
    search goes on with `τ = N_target` until the budget is met; then `spend_remainder` spends the remainder.

    The schedule has `max_steps` steps and the time constant `gamma`, in steps. Where this goes beyond the paper: a layer
    that never shrinks stays dense, which is exact and costs no more than its break-even rank; the paper says nothing about
    the remainder, nor about a budget that is not met after the last step.
    """

    name = "greedy"

    def __init__(self, gamma: float = 80.0, max_steps: int = 500) -> None:
        self.gamma = gamma
        self.max_steps = max_steps

    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """See `Allocator.allocate`."""
        problem.check()
        layers = problem.layers
        # The last option is the dense layer, or the one rank that the user fixed.
        choice = np.array([len(layer.options) - 1 for layer in layers], dtype=np.int64)
        cost = start = problem.budget - problem.left(choice)
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
                index = max(int(np.searchsorted(layer.option_costs[:current], allowed, side="right")) - 1, 0)
                if layer.option_losses[index] < best_loss:
                    best, best_index, best_loss = position, index, float(layer.option_losses[index])
            cost -= int(layers[best].option_costs[choice[best]] - layers[best].option_costs[best_index])
            choice[best] = best_index
        return problem.to_ranks(spend_remainder(problem, choice))
