"""Every layer keeps the same share of its parameters."""

from __future__ import annotations

import numpy as np

from .allocator import ALLOCATORS, Allocator
from .problem import AllocationProblem, RankAllocation
from .remainder import raise_evenly
from .sites import SiteProfile


@ALLOCATORS.register
class UniformAllocator(Allocator):
    """Gives every layer the same share of its dense cost, the largest that meets the budget, found by bisection.

    Floors, ceilings and multiples bound the share of single layers; the remainder is spent step by step on the layers
    that keep the smallest share (`raise_evenly`). Losses are ignored. Where MLPs can only become narrower, the remainder is
    left: with the same share in all of them, an ordinary configuration describes the model.
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
        even = self._choice(problem, low)
        return problem.to_ranks(even if _only_widths(problem) else raise_evenly(problem, even))

    def _choice(self, problem: AllocationProblem, share: float) -> np.ndarray:
        indices = [
            max(0, int(np.searchsorted(layer.option_costs, share * layer.dense_cost, side="right")) - 1)
            for layer in problem.layers
        ]
        return np.array(indices, dtype=np.int64)


def _only_widths(problem: AllocationProblem) -> bool:
    """Return whether the only choice is how many units MLPs keep."""
    sites = [layer for layer in problem.layers if isinstance(layer, SiteProfile)]
    choices = [choice for site in sites for option in site.options for choice in option]
    single = [option for layer in problem.layers if not isinstance(layer, SiteProfile) for option in layer.options]
    return bool(sites) and all(choice.rank is None for choice in choices) and all(each is None for each in single)
