"""The smallest sum of losses under the budget."""

from __future__ import annotations

import numpy as np

from .allocator import ALLOCATORS, Allocator
from .problem import AllocationProblem, RankAllocation
from .remainder import spend_remainder


@ALLOCATORS.register
class GlobalAllocator(Allocator):
    """Minimises `Σ loss_l(r_l)` subject to `Σ cost_l(r_l) ≤ budget` with a Lagrange multiplier.

    At a multiplier λ, the price of one stored value, every layer independently takes the option with the smallest
    `loss + λ cost`, which may be to stay dense. The sum of these minima minus `λ budget` is a lower bound of the optimum
    (weak duality). λ is found by bisection, and `spend_remainder` spends the remainder. The gap to the optimum is at
    most the loss decrease of the one step that did not fit: λ times the remainder after the bisection.

    Only options on the lower convex hull of loss over cost win at some λ, and the jump to dense takes many off it.
    Therefore pairs of layers then exchange budget, one shrinking and one growing, as long as this lowers the sum: at
    most `max_exchanges` times, though few exchanges are ever found.
    """

    name = "global"

    def __init__(self, max_exchanges: int = 20) -> None:
        self.max_exchanges = max_exchanges

    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """See `Allocator.allocate`."""
        problem.check()
        low, high = 0.0, 1.0
        while problem.left(self._choice(problem, high)) < 0:
            low, high = high, high * 8
        # 100 halvings reach neighbouring floating-point numbers from any starting point that occurs.
        for _ in range(100):
            middle = (low + high) / 2
            if problem.left(self._choice(problem, middle)) < 0:
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
        # Of equally good options, argmin takes the first, which is the cheapest.
        indices = [int(np.argmin(layer.option_losses + price * layer.option_costs)) for layer in problem.layers]
        return np.array(indices, dtype=np.int64)


def _best_exchange(problem: AllocationProblem, choice: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return `(layer, option)` for the layer to shrink and for the one to grow; None if no pair lowers the sum.

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
    # Gains in the last digits are rounding errors, because of which two exchanges could undo each other forever.
    best_gain = 1e-12 * sum(float(layer.option_losses[i]) for layer, i in zip(problem.layers, choice, strict=True))
    for index, (layer, i) in enumerate(zip(problem.layers, choice, strict=True)):
        targets = np.searchsorted(layer.option_costs, layer.option_costs[i] + left, side="right") - 1
        gains = layer.option_losses[i] - layer.option_losses[targets] - harm
        gains[owners == index] = -np.inf
        row = int(np.argmax(gains))
        if gains[row] > best_gain:
            best, best_gain = (givers[row], (index, int(targets[row]))), float(gains[row])
    return best
