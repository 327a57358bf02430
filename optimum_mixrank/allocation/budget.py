"""From a configuration and the shapes of layers to an allocation problem; tensors and models are not needed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..checkpoint.rank_map import break_even, stored_values
from ..runtime.logging import get_logger
from . import ALLOCATORS, AllocationProblem, BudgetError, LayerProfile


logger = get_logger(__name__)

# In stored values or ranks: a ratio like 0.6 of a round number is not missed by the rounding of floating point numbers.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LayerSpec:
    """What the plan knows of a targeted layer before any data is seen.

    Attributes:
        name: Canonical name.
        out_features: `m`.
        in_features: `n`.
        price: Cost of one stored value: 1 counts parameters, the tokens per image count multiply-adds per image.
        rank: Rank that the user asked for (`rank_pattern`).
        ratio: Fraction to remove that the user asked for (`ratio_pattern`).
    """

    name: str
    out_features: int
    in_features: int
    price: int = 1
    rank: int | None = None
    ratio: float | None = None

    @property
    def dense_cost(self) -> int:
        """Cost of the dense weight."""
        return self.out_features * self.in_features * self.price


@dataclass(frozen=True)
class RankBudget:
    """The constraints under which ranks are sought.

    Args:
        layers: The targeted layers.
        model_cost: Parameters (or multiply-adds per image) of the whole model.
        compression_ratio: Fraction to remove, in (0, 1).
        compression_scope: `"model"` or `"targets"`.
        rank_multiple: Ranks are multiples of it.
        min_rank: Smallest rank.
        min_rank_ratio: Smallest share of the break-even rank.
        layout: How factors are stored; see `FactoredLayer`. Break-even is where they take as much as the dense layer.
        max_rank_ratio: Largest share of the break-even rank of a factored layer; staying dense remains possible.
        unit: What is counted, for messages.

    Raises:
        ValueError: if a rank or a ratio that was asked for does not fit its layer.
    """

    layers: Sequence[LayerSpec]
    model_cost: int
    compression_ratio: float
    compression_scope: str = "model"
    rank_multiple: int = 1
    min_rank: int = 1
    min_rank_ratio: float = 0.1
    layout: str = "factors"
    max_rank_ratio: float | None = None
    unit: str = "parameters"
    _free: list[LayerSpec] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        for layer in self.layers:
            limit = min(layer.out_features, layer.in_features)
            if layer.rank is not None and layer.rank > limit:
                raise ValueError(
                    f"rank_pattern gives rank {layer.rank} to layer {layer.name!r} of shape [{layer.out_features}, "
                    f"{layer.in_features}], whose largest rank is {limit}. Choose {limit} or less."
                )
            if layer.rank is not None and layer.ratio is not None:
                raise ValueError(
                    f"Both rank_pattern and ratio_pattern match layer {layer.name!r}. Narrow one of the two."
                )
        # A ratio of 0 leaves a layer dense: nothing is left to decide there.
        self._free.extend(layer for layer in self.layers if layer.ratio != 0)

    @property
    def budget(self) -> int:
        """Cost that all targeted layers together may have."""
        targeted = sum(layer.dense_cost for layer in self.layers)
        base = self.model_cost if self.compression_scope == "model" else targeted
        return math.floor(targeted - self.compression_ratio * base + _TOLERANCE)

    @property
    def is_reachable(self) -> bool:
        """Whether the budget can be met at all; needs no losses."""
        return self._minimum <= self.budget

    def check(self) -> None:
        """Check that the budget can be met at all; needs no losses. Warn of ranks that would save nothing.

        Raises:
            ValueError: says which ratio would be reached.
        """
        if not self.is_reachable:
            raise ValueError(self._unreachable(self._minimum))
        for layer in self._free:
            profile = self._profile(layer, None)
            if layer.rank is not None and not profile.candidate_ranks:
                logger.warning(
                    f"rank_pattern gives rank {layer.rank} to layer {layer.name!r} of shape [{layer.out_features}, "
                    f"{layer.in_features}], which takes no fewer parameters than the dense layer: it stays dense. "
                    f"Ranks up to {profile.break_even} save parameters."
                )

    def allocate(self, losses: Mapping[str, np.ndarray], allocation: str) -> dict[str, int | None]:
        """Find the ranks.

        Args:
            losses: By canonical name, the loss of a layer at rank 0, …, min(m, n), `[min(m, n) + 1]`.
            allocation: Name of the allocator.

        Returns:
            The rank of every layer, None where it stays dense.

        Raises:
            ValueError: if the budget cannot be met.
        """
        problem = self._problem(losses)
        try:
            ranks = ALLOCATORS.create(allocation).allocate(problem)
        except BudgetError as error:
            raise ValueError(self._unreachable(problem.min_cost + self._dense_cost)) from error
        return {layer.name: ranks.get(layer.name) for layer in self.layers}

    def kept(self, ranks: Mapping[str, int | None]) -> float:
        """Share of the targeted layers' cost that an allocation keeps."""
        kept = 0
        for layer in self.layers:
            rank = ranks[layer.name]
            m, n = layer.out_features, layer.in_features
            kept += layer.dense_cost if rank is None else stored_values(m, n, rank, self.layout) * layer.price
        return kept / sum(layer.dense_cost for layer in self.layers)

    @property
    def _minimum(self) -> int:
        return self._problem({}).min_cost + self._dense_cost

    @property
    def _dense_cost(self) -> int:
        return sum(layer.dense_cost for layer in self.layers if layer.ratio == 0)

    def _problem(self, losses: Mapping[str, np.ndarray]) -> AllocationProblem:
        profiles = tuple(self._profile(layer, losses.get(layer.name)) for layer in self._free)
        return AllocationProblem(profiles, self.budget - self._dense_cost)

    def _profile(self, layer: LayerSpec, losses: np.ndarray | None) -> LayerProfile:
        m, n = layer.out_features, layer.in_features
        fixed = layer.rank
        if layer.ratio is not None:
            share = (1 - layer.ratio) * m * n + _TOLERANCE
            multiples = range(0, min(m, n) + 1, self.rank_multiple)
            fitting = bisect_right(multiples, share, key=lambda rank: stored_values(m, n, rank, self.layout)) - 1
            fixed = multiples[fitting]
            if fixed < 1:
                raise ValueError(
                    f"ratio_pattern removes {layer.ratio:.2%} of layer {layer.name!r}, which leaves no rank of "
                    f"{self.rank_multiple}. Remove less, or exclude the layer."
                )
        full = break_even(m, n, self.layout)
        lowest = max(self.min_rank, math.ceil(self.min_rank_ratio * full - _TOLERANCE), 1)
        highest = None
        if self.max_rank_ratio is not None:
            # A ceiling below the floor would leave nothing: then the floor is the one rank there is.
            floor = -(-lowest // self.rank_multiple) * self.rank_multiple
            highest = max(math.floor(self.max_rank_ratio * full + _TOLERANCE), floor)
        return LayerProfile(
            name=layer.name,
            out_features=m,
            in_features=n,
            losses=np.zeros(min(m, n) + 1) if losses is None else losses,
            layout=self.layout,
            price=layer.price,
            min_rank=lowest,
            max_rank=highest,
            rank_multiple=self.rank_multiple,
            fixed_rank=fixed,
        )

    def _unreachable(self, minimum: int) -> str:
        targeted = sum(layer.dense_cost for layer in self.layers)
        base = self.model_cost if self.compression_scope == "model" else targeted
        largest = max(targeted - minimum, 0) * 1000 // base / 1000
        reachable = (
            f"The largest ratio that can be reached is {largest}; lower the ratio or these floors, or target more layers."
            if largest > 0
            else "No layer can shrink at all; lower these floors, or change the patterns."
        )
        return (
            f"compression_ratio={self.compression_ratio} (of the {self.compression_scope}) cannot be reached: the "
            f"targeted layers hold {targeted:,} of the model's {self.model_cost:,} {self.unit} and keep at least "
            f"{minimum:,} under min_rank={self.min_rank}, min_rank_ratio={self.min_rank_ratio}, "
            f"rank_multiple={self.rank_multiple} and the patterns. {reachable}"
        )
