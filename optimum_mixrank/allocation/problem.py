"""The problem of distributing ranks: layers with losses and costs, and a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np


RankAllocation = dict[str, int | None]
"""Rank by layer name; None where the layer stays dense."""


class BudgetError(ValueError):
    """The budget cannot be met even with the smallest ranks.

    Attributes:
        min_cost: What the smallest ranks cost.
    """

    def __init__(self, budget: int, min_cost: int) -> None:
        super().__init__(
            f"A budget of {budget:,} stored values cannot be met: the smallest allowed ranks take {min_cost:,}. "
            "Allow smaller ranks or raise the budget."
        )
        self.min_cost = min_cost


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """What an allocator knows of a layer of shape `[out_features, in_features]`.

    Attributes:
        name: Its name.
        out_features: `m`.
        in_features: `n`.
        losses: `[min(m, n) + 1]`, float64, non-increasing: the loss if rank 0, 1, … is kept. Dense, it is 0.
        extra_cost: Stored values that a factored layer adds whatever its rank.
        min_rank: Smallest rank, rounded up to the multiple.
        max_rank: Largest rank, or None for the layer's own limit.
        rank_multiple: Ranks are multiples of it, except a fixed one.
        fixed_rank: The one rank that is allowed. If it saves nothing, the layer stays dense.

    Raises:
        ValueError: if the losses do not fit the shape or the fixed rank exceeds it.
    """

    name: str
    out_features: int
    in_features: int
    losses: np.ndarray
    extra_cost: int = 0
    min_rank: int = 1
    max_rank: int | None = None
    rank_multiple: int = 1
    fixed_rank: int | None = None

    def __post_init__(self) -> None:
        limit = min(self.out_features, self.in_features)
        if self.losses.shape != (limit + 1,):
            raise ValueError(
                f"Layer {self.name!r} of shape [{self.out_features}, {self.in_features}] needs {limit + 1} losses, for "
                f"ranks 0 to {limit}; there are {self.losses.shape}."
            )
        if self.fixed_rank is not None and not 1 <= self.fixed_rank <= limit:
            raise ValueError(
                f"fixed_rank={self.fixed_rank} of layer {self.name!r} is outside [1, {limit}]; its shape is "
                f"[{self.out_features}, {self.in_features}]."
            )

    @property
    def dense_cost(self) -> int:
        """Stored values of the dense weight, `m n`."""
        return self.out_features * self.in_features

    def cost(self, rank: int | None) -> int:
        """Stored values at a rank; None is dense."""
        if rank is None:
            return self.dense_cost
        return rank * (self.out_features + self.in_features) + self.extra_cost

    def loss(self, rank: int | None) -> float:
        """Loss at a rank; None is dense."""
        return 0.0 if rank is None else float(self.losses[rank])

    @property
    def break_even(self) -> int:
        """Largest rank that costs less than the dense layer; 0 if there is none."""
        return max(0, (self.dense_cost - self.extra_cost - 1) // (self.out_features + self.in_features))

    @cached_property
    def options(self) -> tuple[int | None, ...]:
        """Everything the layer may become, by ascending cost: ranks, then dense."""
        if self.fixed_rank is not None:
            return (self.fixed_rank,) if self.cost(self.fixed_rank) < self.dense_cost else (None,)
        multiple = self.rank_multiple
        highest = self.break_even if self.max_rank is None else min(self.break_even, self.max_rank)
        lowest = -(-max(self.min_rank, 1) // multiple) * multiple
        return (*range(lowest, highest + 1, multiple), None)

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
    """Layers and the stored values that they may take together."""

    layers: tuple[LayerProfile, ...]
    budget: int

    @property
    def min_cost(self) -> int:
        """Stored values with the smallest option everywhere."""
        return sum(int(layer.option_costs[0]) for layer in self.layers)

    def total_cost(self, ranks: Mapping[str, int | None]) -> int:
        """Stored values of an allocation."""
        return sum(layer.cost(ranks[layer.name]) for layer in self.layers)

    def total_loss(self, ranks: Mapping[str, int | None]) -> float:
        """Sum of the losses of an allocation."""
        return sum(layer.loss(ranks[layer.name]) for layer in self.layers)

    def check(self) -> None:
        """Check that the budget can be met.

        Raises:
            BudgetError: if it cannot.
        """
        if self.min_cost > self.budget:
            raise BudgetError(self.budget, self.min_cost)

    def to_ranks(self, choice: np.ndarray) -> RankAllocation:
        """Ranks from the index of the option that each layer takes, `[layers]`."""
        return {layer.name: layer.options[index] for layer, index in zip(self.layers, choice, strict=True)}
