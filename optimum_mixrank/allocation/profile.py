"""Ranks and predicted losses under many budgets, without compressing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..decomposition.mlp import WidthLosses
from .budget import NO_MLPS, RankBudget
from .choice import LayerChoice, ranks_of
from .problem import AllocationProblem


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
        choices: The structure of every layer by canonical name.
        num_values: Values that the weights of these layers keep.
        latency: Predicted share of the dense model's time, if that is what the budget counts.
    """

    ratio: float
    kept: float
    loss: float
    choices: Mapping[str, LayerChoice]
    num_values: int = 0
    latency: float | None = None

    @property
    def ranks(self) -> dict[str, int | None]:
        """See `ranks_of`."""
        return ranks_of(self.choices)


def profile_budgets(
    budgets: Iterable[RankBudget],
    losses: Mapping[str, np.ndarray],
    allocation: str,
    mlp_losses: Mapping[str, Sequence[WidthLosses]] = NO_MLPS,
    problem: AllocationProblem | None = None,
) -> list[BudgetPoint]:
    """Allocate ranks under each of several budgets, which differ in nothing but their ratio; see `RankBudget.allocate`.

    `problem` is that of any of these budgets, if it is known: the options are the same under all of them, and take longer
    to list than to choose from.
    """
    points = []
    for budget in budgets:
        problem = problem or budget.problem(losses, mlp_losses)
        found = budget.solve(replace(problem, budget=budget.free_budget), allocation)
        values = budget.num_values(found.choices)
        latency = budget.kept_of_model(found) if budget.counts_time else None
        kept = budget.kept(found)
        points.append(BudgetPoint(budget.compression_ratio, kept, found.loss, found.choices, values, latency))
    return points
