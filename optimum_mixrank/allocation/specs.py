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
        price: Cost of one stored value: 1 to count parameters, tokens per image to count multiply-adds per image or time.
        rank: Rank that the user asked for (`rank_pattern`).
        ratio: Fraction to remove that the user asked for (`ratio_pattern`).
        members: Number of layers with the same input that it stands for.
        side: The side that shrinks with the hidden units of its MLP, `"out"` or `"in"`; empty if none does.
        full_size: Size of that side with all hidden units; None if it has them all.
    """

    name: str
    out_features: int
    in_features: int
    price: int = 1
    rank: int | None = None
    ratio: float | None = None
    members: int = 1
    side: str = ""
    full_size: int | None = None

    @property
    def size(self) -> int:
        """Size of the side that shrinks with the hidden units; the outputs, if none does."""
        return self.in_features if self.side == "in" else self.out_features

    @property
    def full_shape(self) -> tuple[int, int]:
        """The shape with all hidden units, `(out_features, in_features)`."""
        full = self.full_size or self.size
        return (self.out_features, full) if self.side == "in" else (full, self.in_features)


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


@dataclass(frozen=True)
class ModelSize:
    """How many parameters the whole compressed model may have.

    Attributes:
        parameters: The number.
        like: Name of the model whose size it is; empty for a number of the user's.
    """

    parameters: int
    like: str = ""

    def __str__(self) -> str:
        if self.like:
            return f"like={self.like!r} ({self.parameters:,} parameters)"
        return f"target_parameters={self.parameters}"
