"""Every layer keeps the same share of its parameters."""

from __future__ import annotations

import numpy as np

from .allocator import ALLOCATORS, Allocator
from .problem import AllocationProblem, RankAllocation
from .remainder import raise_evenly


@ALLOCATORS.register
class UniformAllocator(Allocator):
    """Gives every layer the same share of its dense cost, the largest that meets the budget, found by bisection.

    Floors, ceilings and multiples bound the share of single layers; the remainder is spent step by step on the layers
    that keep the smallest share (`raise_evenly`). Losses are ignored.
    """

    name = "uniform"

    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """See `Allocator.allocate`."""
        problem.check()
        low, high = 0.0, 1.0
        if problem.left(self._choice(problem, high)) >= 0:
            low = high
        # 60 halvings resolve the share beyond the precision of a float64.
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if problem.left(self._choice(problem, middle)) >= 0 else (low, middle)
        return problem.to_ranks(raise_evenly(problem, self._choice(problem, low)))

    def _choice(self, problem: AllocationProblem, share: float) -> np.ndarray:
        indices = [
            max(0, int(np.searchsorted(layer.option_costs, share * layer.dense_cost, side="right")) - 1)
            for layer in problem.layers
        ]
        return np.array(indices, dtype=np.int64)
