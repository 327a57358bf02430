"""A table of measured latencies: how long layers take, dense and factored, at several ranks and widths.

A table holds what was measured, as JSON values. Times between two measurements are interpolated:

- over ranks linearly, after an isotonic regression: an allocator needs costs that never fall with the rank, and where
  measurements do, because of noise, their mean is the best guess. Below the lowest rank that was measured a layer is as
  slow as there, beyond the highest one its time grows in proportion to the rank;
- over the widths of an MLP linearly, between ranks that are the same share of the largest.

Layers are measured by themselves, so their times do not quite add up to that of the model that they belong to. The time
of the model without its layers (attention, norms, embeddings, head) is measured too, and the times of all layers are
scaled by the one factor with which both together give the time of the whole model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..checkpoint.rank_map import LAYOUT_NAMES
from ..runtime.formatting import quote, type_of


KIND = "optimum-mixrank table of latencies"
VERSION = 1

SIDES = ("", "out", "in")
"""Which side of a layer shrinks with the hidden units of its MLP; none for layers that are in no MLP."""

MAX_LAYERS = 1_000
"""More different shapes than any model has."""

MAX_POINTS = 1_000
"""More ranks or widths than anybody measures."""

MAX_SIZE = 2**24
"""More inputs, outputs or tokens than any linear layer has."""


@dataclass(frozen=True)
class RankTimes:
    """Times of a factored layer.

    Attributes:
        ranks: Ascending.
        seconds: One value for each rank.
    """

    ranks: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """Return the seconds at these ranks, which need not be integers; they never fall with the rank."""
        smooth = isotonic(np.array(self.seconds))
        beyond = np.maximum(ranks / self.ranks[-1], 1.0)
        return np.interp(ranks, self.ranks, smooth) * beyond


@dataclass(frozen=True)
class LayerTimes:
    """Times of layers of one shape, and of the same layers with fewer hidden units.

    Attributes:
        out_features: `m`, with all hidden units.
        in_features: `n`, with all hidden units.
        tokens: Vectors that the layer maps for one image.
        members: Number of layers with the same input that it stands for; factored, they share their first factor.
        count: How many of them the model has.
        side: The side that shrinks with the hidden units, `"out"` or `"in"`; empty if none does.
        sizes: Sizes of this side, ascending, the last of which is the full one; with an empty side, `out_features` alone.
        dense: Seconds of the dense layer at each size.
        factored: Times of the factored layer by layout, at each size.
    """

    out_features: int
    in_features: int
    tokens: int
    members: int
    count: int
    side: str
    sizes: tuple[int, ...]
    dense: tuple[float, ...]
    factored: Mapping[str, tuple[RankTimes, ...]]

    @property
    def key(self) -> tuple[int, int, int, int, str]:
        """What distinguishes it from the other layers of a table."""
        return self.out_features, self.in_features, self.tokens, self.members, self.side

    @property
    def full_seconds(self) -> float:
        """Seconds of the dense layer with all hidden units."""
        return float(isotonic(np.array(self.dense))[-1])

    def dense_seconds(self, size: int) -> float:
        """Return the seconds of the dense layer whose side has this size."""
        return float(np.interp(size, self.sizes, isotonic(np.array(self.dense))))

    def factored_seconds(self, size: int, layout: str) -> np.ndarray:
        """Return the seconds of the factored layer at rank 0, 1, …, the smaller of its two sizes.

        Raises:
            ValueError: if the layout was not measured.
        """
        if layout not in self.factored:
            raise ValueError(
                f"The table of latencies has no times for layout={layout!r}, only for "
                f"{', '.join(map(repr, self.factored)) or 'dense layers'}; measure it, or choose another layout."
            )
        times, limit = self.factored[layout], self._largest_rank(size)
        shares = np.arange(limit + 1) / limit
        after = min(int(np.searchsorted(self.sizes, size)), len(self.sizes) - 1)
        before = max(after - 1, 0)
        found = [times[index].at(shares * self._largest_rank(self.sizes[index])) for index in (before, after)]
        weight = float(np.interp(size, [self.sizes[before], self.sizes[after]], [0.0, 1.0])) if after else 0.0
        return (1 - weight) * found[0] + weight * found[1]

    def _largest_rank(self, size: int) -> int:
        return min(size, self.in_features if self.side != "in" else self.out_features)


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of the layers of a model, for one batch size on one device.

    Attributes:
        model_seconds: Time of the dense model for one batch.
        rest_seconds: Time of the model without its layers: attention, norms, embeddings, head.
        layers: The layers.
        rank_multiple: Ranks and widths that are multiples of it are no slower than those just below.
        conditions: What was measured: `device`, `threads`, `dtype`, `batch_size`, `runtime`, `image_shape` and versions.
    """

    model_seconds: float
    rest_seconds: float
    layers: tuple[LayerTimes, ...]
    rank_multiple: int
    conditions: Mapping[str, Any]

    @cached_property
    def scale(self) -> float:
        """Factor of the times of layers, with which they and the rest add up to the time of the model."""
        alone = sum(layer.count * layer.full_seconds for layer in self.layers if layer.members == 1)
        return (self.model_seconds - self.rest_seconds) / alone

    def has(self, shape: tuple[int, int], tokens: int, members: int = 1, side: str = "") -> bool:
        """Return whether `find` finds a layer."""
        return self._lookup(shape, tokens, members, side) is not None

    def find(self, shape: tuple[int, int], tokens: int, members: int = 1, side: str = "") -> LayerTimes:
        """Return the times of a layer of a shape, `(out_features, in_features)` with all hidden units.

        Raises:
            ValueError: if the table has none.
        """
        found = self._lookup(shape, tokens, members, side)
        if found is not None:
            return found
        what = f"of shape {list(shape)} for {tokens} tokens"
        what += f", {members} layers as one" if members > 1 else ""
        what += ", with fewer hidden units" if side else ""
        advice = (
            "measure one for this model with `optimum-cli mixrank benchmark --table`"
            if members == 1 and not side
            else "it is measured for whole models: leave out the patterns that single out some of these layers, or use "
            "structures=['rank']"
        )
        raise ValueError(f"The table of latencies has no layer {what}; {advice}.")

    def _lookup(self, shape: tuple[int, int], tokens: int, members: int, side: str) -> LayerTimes | None:
        # A layer of an MLP that is factored by itself takes as long as one that may lose units.
        sides = (side,) if side or members > 1 else SIDES
        keys = [(*shape, tokens, members, each) for each in sides]
        return next((self._by_key[key] for key in keys if key in self._by_key), None)

    @cached_property
    def _by_key(self) -> dict[tuple[int, int, int, int, str], LayerTimes]:
        return {layer.key: layer for layer in self.layers}

    def check_counts(self, counts: Mapping[tuple[tuple[int, int], int], int]) -> None:
        """Check that a model has the layers that were measured.

        Args:
            counts: How many layers it has, by shape and tokens per image.

        Raises:
            ValueError: if it has others.
        """
        known: dict[tuple[tuple[int, int], int], int] = {}
        for layer in self.layers:
            if layer.members == 1:
                key = (layer.out_features, layer.in_features), layer.tokens
                known[key] = known.get(key, 0) + layer.count
        if known != dict(counts):
            raise ValueError(
                f"The table of latencies was measured on another model: on {_listed(known)}; this model has "
                f"{_listed(counts)}. Measure one for this model with `optimum-cli mixrank benchmark --table`."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values; `from_dict` is the inverse."""
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: object) -> LatencyTable:
        """Build a table from JSON values, which may come from an untrusted file.

        Raises:
            ValueError: if they are not a table; the message names the value.
        """
        values = _mapping(content, "it")
        if values.get("kind") != KIND:
            raise ValueError(f"it is not a table of latencies, whose `kind` is {KIND!r}")
        if values.get("version") != VERSION:
            raise ValueError(
                f"its version {quote(values.get('version'))} is unknown, this release reads version {VERSION}; measure it "
                "again, or upgrade with `pip install --upgrade optimum-mixrank`"
            )
        layers = tuple(
            _parse_layer(each, f"layers[{index}]")
            for index, each in enumerate(_list(values.get("layers"), "layers", MAX_LAYERS))
        )
        if len({layer.key for layer in layers}) < len(layers):
            raise ValueError("two of its `layers` are the same")
        if not any(layer.members == 1 for layer in layers):
            raise ValueError("its `layers` hold no single layer")
        model, rest = (_seconds(values.get(name), name) for name in ("model_seconds", "rest_seconds"))
        if rest >= model:
            raise ValueError(f"rest_seconds={rest} is not less than model_seconds={model}")
        multiple = _integer(values.get("rank_multiple"), "rank_multiple", 256)
        return cls(model, rest, layers, multiple, _parse_conditions(values.get("conditions")))


def isotonic(values: np.ndarray) -> np.ndarray:
    """Return the values closest to the given ones, in the sense of least squares, that never fall.

    Neighbours in the wrong order are replaced by their mean until none are left (pool adjacent violators).

    Args:
        values: Float64, `[points]`.
    """
    means: list[float] = []
    sizes: list[int] = []
    for value in values:
        mean, size = float(value), 1
        while means and means[-1] > mean:
            mean = (mean * size + means[-1] * sizes[-1]) / (size + sizes[-1])
            size += sizes.pop()
            means.pop()
        means.append(mean)
        sizes.append(size)
    return np.repeat(means, sizes)


def _parse_layer(stored: object, where: str) -> LayerTimes:
    values = _mapping(stored, where)
    numbers = {
        name: _integer(values.get(name), f"{where}.{name}", MAX_SIZE)
        for name in ("out_features", "in_features", "tokens", "members", "count")
    }
    side = values.get("side")
    if side not in SIDES:
        raise ValueError(f"{where}.side={quote(side)} is not one of {', '.join(map(repr, SIDES))}")
    full = numbers["in_features" if side == "in" else "out_features"]
    sizes = _ascending(values.get("sizes"), f"{where}.sizes")
    if sizes[-1] != full or (not side and len(sizes) > 1):
        raise ValueError(f"{where}.sizes={quote(list(sizes))} does not end with the full size {full} of the layer")
    dense = tuple(_times(values.get("dense"), f"{where}.dense", len(sizes)))
    other = numbers["out_features" if side == "in" else "in_features"]
    factored = {}
    for layout, curves in _mapping(values.get("factored"), f"{where}.factored").items():
        name = f"{where}.factored[{quote(layout)}]"
        if layout not in LAYOUT_NAMES:
            raise ValueError(f"{name} is not a layout; choose one of {', '.join(map(repr, LAYOUT_NAMES))}")
        found = _list(curves, name, MAX_POINTS)
        if len(found) != len(sizes):
            raise ValueError(f"{name} has {len(found)} entries for {len(sizes)} sizes")
        factored[layout] = tuple(
            _parse_curve(each, f"{name}[{index}]", min(size, other))
            for index, (each, size) in enumerate(zip(found, sizes, strict=True))
        )
    return LayerTimes(**numbers, side=str(side), sizes=sizes, dense=dense, factored=factored)


def _parse_curve(stored: object, where: str, limit: int) -> RankTimes:
    values = _mapping(stored, where)
    ranks = _ascending(values.get("ranks"), f"{where}.ranks")
    if ranks[-1] > limit:
        raise ValueError(f"{where}.ranks has {ranks[-1]}, more than the largest rank {limit} of the layer")
    return RankTimes(ranks, tuple(_times(values.get("seconds"), f"{where}.seconds", len(ranks))))


def _parse_conditions(stored: object) -> dict[str, Any]:
    values = _mapping(stored, "conditions")
    for name, value in values.items():
        is_plain = isinstance(value, str | int | float | bool) or value is None
        is_shape = isinstance(value, list) and len(value) <= 8 and all(isinstance(each, int) for each in value)
        if not (isinstance(name, str) and len(name) <= 100 and (is_plain or is_shape)) or len(values) > 100:
            raise ValueError(f"conditions[{quote(name)}]={quote(value)} is neither a text nor a number")
    return values


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {type_of(value)}, not an object with names and values")
    return dict(value)


def _list(value: object, where: str, most: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
        raise ValueError(f"{where}={quote(value)} is not a list of 1 to {most:,} entries")
    return value


def _integer(value: object, where: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{where}={quote(value)} is not an integer from 1 to {most:,}")
    return value


def _seconds(value: object, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Less than an hour, also so that times in nanoseconds can be added up.
    if not is_number or not 0 < value < 3600:  # type: ignore[operator]
        raise ValueError(f"{where}={quote(value)} is not a positive number of seconds")
    return float(value)  # type: ignore[arg-type]


def _times(value: object, where: str, count: int) -> list[float]:
    found = _list(value, where, MAX_POINTS)
    if len(found) != count:
        raise ValueError(f"{where} has {len(found)} entries, not {count}")
    return [_seconds(each, f"{where}[{index}]") for index, each in enumerate(found)]


def _ascending(value: object, where: str) -> tuple[int, ...]:
    found = [_integer(each, where, MAX_SIZE) for each in _list(value, where, MAX_POINTS)]
    if any(high <= low for low, high in itertools.pairwise(found)):
        raise ValueError(f"{where}={quote(found)} is not ascending")
    return tuple(found)


def _listed(counts: Mapping[tuple[tuple[int, int], int], int]) -> str:
    found = [f"{count} x {list(shape)} at {tokens} tokens" for (shape, tokens), count in sorted(counts.items())]
    return ", ".join(found[:6]) + (" and others" if len(found) > 6 else "")


def nanoseconds(seconds: float) -> int:
    """Return a time as an allocator counts it."""
    return math.ceil(seconds * 1e9)
