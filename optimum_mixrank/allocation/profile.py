"""What would a budget cost? Ranks and predicted losses over many budgets, without compressing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .budget import RankBudget


NATS = "nats per image"
NORMALISED = "sum of normalised energies"


@dataclass(frozen=True)
class BudgetPoint:
    """One budget.

    Attributes:
        ratio: What `compression_ratio` would be.
        kept: Share of the targeted layers' stored values that the ranks keep.
        loss: Predicted loss, in nats per image with `metric="kfac"`, else the sum of the layers' normalised energies. It
            is the loss of the one-shot factors to second order; compensation lowers it, large errors exceed it.
        ranks: Rank by canonical name; None where a layer stays dense.
    """

    ratio: float
    kept: float
    loss: float
    ranks: Mapping[str, int | None]


def profile_budgets(
    budgets: Iterable[RankBudget], losses: Mapping[str, np.ndarray], allocation: str
) -> list[BudgetPoint]:
    """Allocate ranks under every budget.

    Args:
        budgets: The same layers under ascending ratios.
        losses: By canonical name, the loss of a layer at rank 0, …, min(m, n), `[min(m, n) + 1]`.
        allocation: Name of the allocator.

    Raises:
        ValueError: if a budget cannot be met.
    """
    points = []
    for budget in budgets:
        ranks = budget.allocate(losses, allocation)
        loss = sum(float(losses[name][rank]) for name, rank in ranks.items() if rank is not None)
        points.append(BudgetPoint(budget.compression_ratio, budget.kept(ranks), loss, ranks))
    return points
