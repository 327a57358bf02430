"""The least sum of losses under the budget."""

from __future__ import annotations

import numpy as np

from .allocator import Allocator, register_allocator
from .problem import AllocationProblem, RankAllocation
from .remainder import spend_remainder


@register_allocator
class GlobalAllocator(Allocator):
    """Minimises `Σ loss_l(r_l)` subject to `Σ cost_l(r_l) ≤ budget` with a Lagrange multiplier.

    For a price λ of one stored value every layer takes, independently, the option with the least `loss + λ cost`; a
    layer stays dense where that wins. The sum of these minima less `λ budget` bounds the optimum from below (weak
    duality), λ is bisected to the budget, and the remainder is spent by best return. What is missed to the optimum is at
    most the loss decrease of the one step that did not fit.
    """

    name = "global"

    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """See `Allocator.allocate`."""
        problem.check()
        low, high = 0.0, 1.0
        while self._cost(problem, self._choice(problem, high)) > problem.budget:
            low, high = high, high * 8
        # 100 halvings reach neighbouring floating point numbers from any start that occurs.
        for _ in range(100):
            middle = (low + high) / 2
            if self._cost(problem, self._choice(problem, middle)) > problem.budget:
                low = middle
            else:
                high = middle
        return problem.to_ranks(spend_remainder(problem, self._choice(problem, high)))

    def _choice(self, problem: AllocationProblem, price: float) -> np.ndarray:
        # argmin takes the first, that is the cheapest, of equal options.
        indices = [int(np.argmin(layer.option_losses + price * layer.option_costs)) for layer in problem.layers]
        return np.array(indices, dtype=np.int64)

    def _cost(self, problem: AllocationProblem, choice: np.ndarray) -> int:
        return sum(int(layer.option_costs[i]) for layer, i in zip(problem.layers, choice, strict=True))
