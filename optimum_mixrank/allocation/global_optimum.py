"""The least sum of losses under the budget."""

from __future__ import annotations

import numpy as np

from .allocator import ALLOCATORS, Allocator
from .problem import AllocationProblem, RankAllocation
from .remainder import spend_remainder


@ALLOCATORS.register
class GlobalAllocator(Allocator):
    """Minimises `Σ loss_l(r_l)` subject to `Σ cost_l(r_l) ≤ budget` with a Lagrange multiplier.

    For a price λ of one stored value every layer takes, independently, the option with the least `loss + λ cost`; a
    layer stays dense where that wins. The sum of these minima less `λ budget` bounds the optimum from below (weak
    duality), λ is bisected to the budget, and the remainder is spent by best return. What is missed to the optimum is
    at most the loss decrease of the one step that did not fit: λ times the remainder that the bisection left.

    Only options on the lower convex hull of loss over cost win at some λ, and the jump to dense takes many off it. So
    pairs of layers then exchange: one shrinks, another grows, for as long as this lowers the sum.

    Args:
        max_exchanges: Exchanges at most; few are ever found.
    """

    name = "global"

    def __init__(self, max_exchanges: int = 20) -> None:
        self.max_exchanges = max_exchanges

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
        choice = spend_remainder(problem, self._choice(problem, high))
        for _ in range(self.max_exchanges):
            exchange = _best_exchange(problem, choice)
            if exchange is None:
                break
            for index, target in exchange:
                choice[index] = target
            choice = spend_remainder(problem, choice)
        return problem.to_ranks(choice)

    def _choice(self, problem: AllocationProblem, price: float) -> np.ndarray:
        # argmin takes the first, that is the cheapest, of equal options.
        indices = [int(np.argmin(layer.option_losses + price * layer.option_costs)) for layer in problem.layers]
        return np.array(indices, dtype=np.int64)

    def _cost(self, problem: AllocationProblem, choice: np.ndarray) -> int:
        return sum(int(layer.option_costs[i]) for layer, i in zip(problem.layers, choice, strict=True))


def _best_exchange(problem: AllocationProblem, choice: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """`(layer, option)` of the layer that shrinks and of the one that grows; None if no pair lowers the sum.

    A layer shrinks by 1, 2, 4, … options; another takes the largest option that then fits.
    """
    givers = [(index, int(i) - (1 << power)) for index, i in enumerate(choice) for power in range(int(i).bit_length())]
    if not givers:
        return None
    owners = np.array([index for index, _ in givers])
    left: np.ndarray = np.empty(len(givers), dtype=np.int64)
    harm: np.ndarray = np.empty(len(givers))
    for row, (index, target) in enumerate(givers):
        layer, i = problem.layers[index], choice[index]
        left[row] = layer.option_costs[i] - layer.option_costs[target]
        harm[row] = layer.option_losses[target] - layer.option_losses[i]
    left += problem.left(choice)

    best = None
    # Gains in the last digits are rounding; two exchanges could undo each other.
    best_gain = 1e-12 * sum(float(layer.option_losses[i]) for layer, i in zip(problem.layers, choice, strict=True))
    for index, (layer, i) in enumerate(zip(problem.layers, choice, strict=True)):
        targets = np.searchsorted(layer.option_costs, layer.option_costs[i] + left, side="right") - 1
        gains = layer.option_losses[i] - layer.option_losses[targets] - harm
        gains[owners == index] = -np.inf
        row = int(np.argmax(gains))
        if gains[row] > best_gain:
            best, best_gain = (givers[row], (index, int(targets[row]))), float(gains[row])
    return best
