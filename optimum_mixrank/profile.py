"""What would a budget cost? Ranks and predicted losses over many budgets, without compressing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .planning import RankPlan


NATS = "nats per image"


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


@dataclass(frozen=True)
class RankProfile:
    """Predicted loss over budgets, by ascending ratio.

    Attributes:
        points: The budgets.
        unit: Of the losses.
    """

    points: Sequence[BudgetPoint]
    unit: str

    def __str__(self) -> str:
        lines = [f"{'ratio':>7}  {'kept':>7}  predicted loss ({self.unit})"]
        lines += [f"{point.ratio:>7.1%}  {point.kept:>7.1%}  {point.loss:.4g}" for point in self.points]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw predicted loss and ranks over the budgets.

        Args:
            path: Where to; the suffix says how: `.png`, `.svg` or `.pdf`.
        """
        from .reporting.profile_plot import plot_profile

        return plot_profile(self, path)


def profile_budgets(
    plans: Iterable[RankPlan], losses: Mapping[str, np.ndarray], allocation: str, common_unit: bool
) -> RankProfile:
    """Allocate ranks under every plan.

    Args:
        plans: The same layers under ascending ratios.
        losses: By canonical name, the loss of a layer at rank 0, …, min(m, n), `[min(m, n) + 1]`.
        allocation: Name of the allocator.
        common_unit: Whether the losses are in nats per image rather than shares of each layer's energy.

    Raises:
        ValueError: if a budget cannot be met.
    """
    points = []
    for plan in plans:
        ranks = plan.allocate(losses, allocation)
        loss = sum(float(losses[name][rank]) for name, rank in ranks.items() if rank is not None)
        points.append(BudgetPoint(plan.compression_ratio, plan.kept(ranks), loss, ranks))
    return RankProfile(points, NATS if common_unit else "sum of normalised energies")
