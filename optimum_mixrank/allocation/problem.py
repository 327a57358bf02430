"""The allocation problem: layers with losses and costs, and a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..checkpoint.rank_map import stored_values


RankAllocation = dict[str, Any]
"""What each layer or site takes, by its name: a rank, or None where a layer stays dense; of a site, one of its options."""


class BudgetError(ValueError):
    """The budget cannot be met even with the smallest ranks, which cost `min_cost`."""

    def __init__(self, budget: int, min_cost: int) -> None:
        super().__init__(
            f"A budget of {budget:,} stored values cannot be met: the smallest allowed ranks take {min_cost:,}. "
            "Allow smaller ranks or raise the budget."
        )
        self.budget = budget
        self.min_cost = min_cost


class Profile(Protocol):
    """What an allocator knows about a layer, or about layers that are decided together.

    Attributes:
        name: Its name.
        options: All choices, by ascending cost.
        option_costs: Their costs, int64, `[options]`.
        option_losses: Their losses, float64, `[options]`.
        dense_cost: Cost of what stays dense.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def options(self) -> Sequence[Any]: ...  # noqa: D102
    @property
    def option_costs(self) -> np.ndarray: ...  # noqa: D102
    @property
    def option_losses(self) -> np.ndarray: ...  # noqa: D102
    @property
    def dense_cost(self) -> int: ...  # noqa: D102
    def cost(self, option: Any, /) -> int: ...  # noqa: D102
    def loss(self, option: Any, /) -> float: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """What an allocator knows about a layer of shape `[out_features, in_features]`.

    Costs are stored values times `price`: with a price of 1 they count parameters, with the number of tokens per image
    as the price they count multiply-adds per image. To count otherwise, as by latency, override `cost`, which must
    not fall with the rank, and `dense_cost`; break-even, candidate ranks and options follow from these two.

    Attributes:
        name: Name of the layer.
        out_features: `m`.
        in_features: `n`.
        losses: `[min(m, n) + 1]`, float64, non-increasing: the loss at rank 0, 1, …; the dense layer has none.
        layout: How factors are stored; see `FactoredLayer`.
        price: Cost of one stored value.
        min_rank: Smallest rank; rounded up to the multiple.
        max_rank: Largest rank of a factored layer; None for break-even. Staying dense remains possible.
        rank_multiple: Ranks are multiples of it, except for a fixed one.
        fixed_rank: The only rank allowed. If it saves nothing, the layer stays dense.
        factored: Whether the layer may be factored at all.

    Raises:
        ValueError: if a bound is impossible, or if the losses do not fit the shape, are not finite or increase.
    """

    name: str
    out_features: int
    in_features: int
    losses: np.ndarray
    layout: str = "factors"
    price: int = 1
    min_rank: int = 1
    max_rank: int | None = None
    rank_multiple: int = 1
    fixed_rank: int | None = None
    factored: bool = True

    def __post_init__(self) -> None:
        limit = min(self.out_features, self.in_features)
        for field in ("price", "min_rank", "rank_multiple"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} of layer {self.name!r} is too small; give at least 1.")
        if self.max_rank is not None and self.max_rank < self._lowest_rank:
            raise ValueError(
                f"max_rank={self.max_rank} of layer {self.name!r} is below its smallest rank {self._lowest_rank} "
                f"(min_rank={self.min_rank}, rank_multiple={self.rank_multiple}); raise it or lower these."
            )
        if self.losses.shape != (limit + 1,):
            raise ValueError(
                f"Layer {self.name!r} of shape [{self.out_features}, {self.in_features}] needs {limit + 1} losses, "
                f"for ranks 0 to {limit}; there are {self.losses.shape}."
            )
        if self.fixed_rank is not None and not 1 <= self.fixed_rank <= limit:
            raise ValueError(f"fixed_rank={self.fixed_rank} of layer {self.name!r} is outside [1, {limit}].")
        if not np.isfinite(self.losses).all():
            raise ValueError(f"Losses of layer {self.name!r} hold NaN or Inf; check its weight and its statistics.")
        # Rounding may let sums of squared singular values increase in their last digits.
        rise = float(np.diff(self.losses).max())
        if rise > 1e-9 * float(np.abs(self.losses).max()):
            raise ValueError(
                f"Losses of layer {self.name!r} increase with the rank, by up to {rise:.3g}; order them by rank, none "
                "larger than the one before."
            )

    @property
    def dense_cost(self) -> int:
        """Cost of the dense weight, `m n` values."""
        return self.out_features * self.in_features * self.price

    def cost(self, rank: int | None) -> int:
        """Return the cost at a rank, or of the dense layer for None."""
        if rank is None:
            return self.dense_cost
        return stored_values(self.out_features, self.in_features, rank, self.layout) * self.price

    def loss(self, rank: int | None) -> float:
        """Return the loss at a rank, or of the dense layer for None."""
        return 0.0 if rank is None else float(self.losses[rank])

    @property
    def break_even(self) -> int:
        """The largest rank that costs less than the dense layer; 0 if there is none."""
        ranks = range(min(self.out_features, self.in_features) + 1)
        return max(0, bisect_left(ranks, self.dense_cost, key=self.cost) - 1)

    @cached_property
    def candidate_ranks(self) -> tuple[int, ...]:
        """Ranks at which the layer may be factored, ascending; empty if it has to stay dense."""
        if not self.factored:
            return ()
        if self.fixed_rank is not None:
            return (self.fixed_rank,) if self.cost(self.fixed_rank) < self.dense_cost else ()
        highest = self.break_even if self.max_rank is None else min(self.break_even, self.max_rank)
        ranks = range(self._lowest_rank, highest + 1, self.rank_multiple)
        # Measured costs rise in steps: a rank that costs as much as the next one is never worth choosing.
        costs = [*(self.cost(rank) for rank in ranks), self.dense_cost]
        return tuple(rank for index, rank in enumerate(ranks) if costs[index] < costs[index + 1])

    @cached_property
    def options(self) -> tuple[int | None, ...]:
        """All choices for the layer by ascending cost: the candidate ranks, then None (dense) unless a rank is fixed."""
        if self.fixed_rank is not None and self.candidate_ranks:
            return self.candidate_ranks
        return (*self.candidate_ranks, None)

    @property
    def _lowest_rank(self) -> int:
        return -(-self.min_rank // self.rank_multiple) * self.rank_multiple

    @cached_property
    def option_costs(self) -> np.ndarray:
        """Costs of `options`, int64."""
        return np.array([self.cost(option) for option in self.options], dtype=np.int64)

    @cached_property
    def option_losses(self) -> np.ndarray:
        """Losses of `options`, float64."""
        return np.array([self.loss(option) for option in self.options], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Layers and their common budget in stored values.

    Raises:
        ValueError: if two layers have the same name.
    """

    layers: tuple[Profile, ...]
    budget: int

    def __post_init__(self) -> None:
        counts = Counter(layer.name for layer in self.layers)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"The names {repeated} belong to several layers each; give every layer its own name.")

    @property
    def min_cost(self) -> int:
        """Cost of the smallest options of all layers."""
        return sum(int(layer.option_costs[0]) for layer in self.layers)

    @property
    def dense_cost(self) -> int:
        """Cost of all layers if they stay dense."""
        return sum(layer.dense_cost for layer in self.layers)

    def left(self, choice: np.ndarray) -> int:
        """Return the remainder of the budget under a choice (see `to_ranks`); negative if the choice exceeds it."""
        return self.budget - sum(int(layer.option_costs[i]) for layer, i in zip(self.layers, choice, strict=True))

    def total_cost(self, ranks: Mapping[str, Any]) -> int:
        """Return the cost of an allocation."""
        return sum(layer.cost(ranks[layer.name]) for layer in self.layers)

    def total_loss(self, ranks: Mapping[str, Any]) -> float:
        """Return the sum of the losses of an allocation."""
        return sum(layer.loss(ranks[layer.name]) for layer in self.layers)

    def check(self) -> None:
        """Check that the budget can be met.

        Raises:
            BudgetError: if it cannot.
        """
        if self.min_cost > self.budget:
            raise BudgetError(self.budget, self.min_cost)

    def to_ranks(self, choice: np.ndarray) -> RankAllocation:
        """Return the ranks for a choice: the index of the option that each layer takes, `[layers]`."""
        return {layer.name: layer.options[index] for layer, index in zip(self.layers, choice, strict=True)}
