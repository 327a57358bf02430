"""Ranks and predicted losses under several budgets."""

import numpy as np
import pytest

from optimum_mixrank.allocation.budget import RankBudget
from optimum_mixrank.allocation.profile import profile_budgets
from optimum_mixrank.allocation.specs import LayerSpec


LAYERS = [LayerSpec("a", 16, 16), LayerSpec("b", 16, 16)]
LOSSES = {"a": np.linspace(1, 0, 17), "b": np.linspace(3, 0, 17)}


def test_a_point_per_budget_with_the_ranks_of_the_allocator():
    budgets = [RankBudget(LAYERS, 512, ratio) for ratio in (0.25, 0.5)]
    points = profile_budgets(budgets, LOSSES, "global")
    assert [point.ratio for point in points] == [0.25, 0.5]
    for point, budget in zip(points, budgets, strict=True):
        found = budget.allocate(LOSSES, "global")
        assert point.ranks == found.ranks
        assert point.kept == budget.kept(found) <= 1 - point.ratio
        # A dense layer loses nothing.
        assert point.loss == pytest.approx(sum(LOSSES[name][rank] for name, rank in point.ranks.items() if rank))


def test_a_budget_out_of_reach():
    with pytest.raises(ValueError, match=r"compression_ratio=0\.99 .* cannot be reached"):
        profile_budgets([RankBudget(LAYERS, 512, 0.99)], LOSSES, "global")
