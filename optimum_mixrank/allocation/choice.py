"""What has been decided for a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChoice:
    """The structure of one layer.

    Attributes:
        rank: Rank of its factors, or of the joint factors that it shares; None for a dense layer.
        shared: Whether it shares its first factor with the other layers that see the same input.
        width: Hidden units that its MLP keeps, for both layers of the MLP; None where nothing is removed.
        loss: Predicted loss, its own share where several layers are decided together.
    """

    rank: int | None = None
    shared: bool = False
    width: int | None = None
    loss: float = 0.0

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays as it is."""
        return self.rank is None and self.width is None


def ranks_of(choices: Mapping[str, LayerChoice]) -> dict[str, int | None]:
    """Return ranks by canonical name; None where a layer is dense, though perhaps narrower."""
    return {name: choice.rank for name, choice in choices.items()}


@dataclass(frozen=True)
class Allocation:
    """What has been decided for all layers.

    Attributes:
        choices: By canonical name.
        cost: Cost of all targeted layers, in the unit of the budget.
        loss: Predicted loss of all together.
    """

    choices: Mapping[str, LayerChoice]
    cost: int
    loss: float

    @property
    def ranks(self) -> dict[str, int | None]:
        """See `ranks_of`."""
        return ranks_of(self.choices)
