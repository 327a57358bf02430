"""Ranks and predicted losses under many budgets, without compressing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .budget import RankBudget


NATS = "nats per image"
NORMALISED = "sum of normalised energies"


@dataclass(frozen=True)
class BudgetPoint:
    """Ranks and predicted loss under one budget.

    Attributes:
        ratio: The `compression_ratio`.
        kept: Share of the targeted layers' stored values that the ranks keep.
        loss: Predicted loss, in nats per image with `metric="kfac"`, else the sum of the layers' normalised energies. It
            is the loss of the one-shot factors to second order: compensation lowers it, and large errors exceed it.
        ranks: Ranks by canonical name; None where a layer stays dense.
    """

    ratio: float
    kept: float
    loss: float
    ranks: Mapping[str, int | None]


def profile_budgets(
    budgets: Iterable[RankBudget], losses: Mapping[str, np.ndarray], allocation: str
) -> list[BudgetPoint]:
    """Allocate ranks under each of several budgets for the same layers; see `RankBudget.allocate`."""
    points = []
    for budget in budgets:
        ranks = budget.allocate(losses, allocation)
        loss = sum(float(losses[name][rank]) for name, rank in ranks.items() if rank is not None)
        points.append(BudgetPoint(budget.compression_ratio, budget.kept(ranks), loss, ranks))
    return points
