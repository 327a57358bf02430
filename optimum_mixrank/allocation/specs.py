"""What is known about layers before any data is seen: shapes, prices, and which of them are decided together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """What is known about a targeted layer before any data is seen.

    Attributes:
        name: Canonical name.
        out_features: `m`.
        in_features: `n`.
        price: Cost of one stored value: 1 to count parameters, tokens per image to count multiply-adds per image.
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
class SharedInputSpec:
    """Layers that see the same input and may share their first factor.

    Attributes:
        name: Name of the site.
        members: Canonical names of the layers.
    """

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class MlpSpec:
    """The two layers of an MLP, some of whose hidden units may be removed.

    Attributes:
        name: Name of the site.
        first: Canonical names of the first layer, or of the gate and the value that feed the same units.
        second: Canonical name of the second layer.
    """

    name: str
    first: tuple[str, ...]
    second: str

    @property
    def members(self) -> tuple[str, ...]:
        """Canonical names of all its layers."""
        return (*self.first, self.second)


SiteSpec = SharedInputSpec | MlpSpec
