"""What a budget counts: stored values, multiply-adds, or measured time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..checkpoint.rank_map import break_even
from .latency import LatencyTable, LayerTimes, nanoseconds
from .problem import LayerProfile
from .specs import LayerSpec


class Costs(Protocol):
    """Prices layers.

    Attributes:
        unit: The unit of costs, for messages.
    """

    @property
    def unit(self) -> str: ...  # noqa: D102

    def dense_cost(self, layer: LayerSpec) -> int:
        """Return the cost of a dense layer."""

    def profile(self, layer: LayerSpec, **bounds: Any) -> LayerProfile:
        """Return what an allocator knows about a layer; `bounds` are the other fields of its profile."""


@dataclass(frozen=True)
class StoredValues:
    """Counts stored values times the price of each: parameters, or multiply-adds per image."""

    unit: str = "parameters"

    def dense_cost(self, layer: LayerSpec) -> int:
        """See `Costs.dense_cost`."""
        return layer.out_features * layer.in_features * layer.price

    def profile(self, layer: LayerSpec, **bounds: Any) -> LayerProfile:
        """See `Costs.profile`."""
        return LayerProfile(layer.name, layer.out_features, layer.in_features, price=layer.price, **bounds)


PARAMETERS = StoredValues()


@dataclass(frozen=True)
class MeasuredTime:
    """Counts nanoseconds per batch, by a table of latencies; the price of a layer is the number of its tokens."""

    table: LatencyTable
    unit: str = "nanoseconds per batch"
    _known: dict[tuple[Any, ...], tuple[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def model_cost(self) -> int:
        """Cost of the whole dense model."""
        return nanoseconds(self.table.model_seconds)

    def dense_cost(self, layer: LayerSpec) -> int:
        """See `Costs.dense_cost`.

        Raises:
            ValueError: if the table has no such layer.
        """
        times, size = self._times(layer)
        return nanoseconds(times.dense_seconds(size) * self.table.scale)

    def profile(self, layer: LayerSpec, **bounds: Any) -> TimedProfile:
        """See `Costs.profile`.

        Raises:
            ValueError: if the table has no such layer, or not in this layout.
        """
        layout = bounds.get("layout", "factors")
        key = (layer.out_features, layer.in_features, layer.price, layer.members, layer.side, layer.full_size, layout)
        if key not in self._known:
            times, size = self._times(layer)
            seconds = times.factored_seconds(size, layout) * self.table.scale
            self._known[key] = self.dense_cost(layer), np.ceil(seconds * 1e9).astype(np.int64)
        dense, ranks = self._known[key]
        shape = layer.out_features, layer.in_features
        return TimedProfile(layer.name, *shape, dense_time=dense, rank_times=ranks, **bounds)

    def _times(self, layer: LayerSpec) -> tuple[LayerTimes, int]:
        """Return the times of a layer, and the size at which they are to be read."""
        times = self.table.find(layer.full_shape, layer.price, layer.members, layer.side)
        # A layer of an MLP that is decided by itself has all its units.
        return times, layer.size if layer.side else times.sizes[-1]


NO_TIMES: np.ndarray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class TimedProfile(LayerProfile):
    """What an allocator knows about a layer whose cost is time.

    Attributes:
        dense_time: Cost of the dense layer.
        rank_times: Cost at rank 0, …, int64, `[min(m, n) + 1]`; never falls with the rank.
    """

    dense_time: int = 0
    rank_times: np.ndarray = field(default_factory=lambda: NO_TIMES)

    @property
    def dense_cost(self) -> int:
        """See `LayerProfile.dense_cost`."""
        return self.dense_time

    def cost(self, rank: int | None) -> int:
        """See `LayerProfile.cost`."""
        return self.dense_time if rank is None else int(self.rank_times[rank])

    @cached_property
    def break_even(self) -> int:
        """The largest rank that is faster than the dense layer and stores fewer values; 0 if there is none."""
        by_values = math.ceil(break_even(self.out_features, self.in_features, self.layout)) - 1
        return max(0, min(int(np.searchsorted(self.rank_times, self.dense_time)) - 1, by_values))
