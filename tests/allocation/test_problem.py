"""The options of a layer, their costs, and the problems that are refused."""

import numpy as np
import pytest
from allocation.problems import allowed_ranks, layer, random_problem

from optimum_mixrank.allocation import AllocationProblem, BudgetError, LayerProfile


@pytest.mark.parametrize(
    "shape, bounds, expected",
    [
        pytest.param((8, 8), {}, (1, 2, 3, None), id="half the rank of a square layer saves nothing"),
        pytest.param((6, 12), {}, (1, 2, 3, None), id="wide"),
        pytest.param((12, 6), {}, (1, 2, 3, None), id="tall"),
        pytest.param((24, 24), {"rank_multiple": 4}, (4, 8, None), id="multiples"),
        pytest.param((24, 24), {"rank_multiple": 4, "min_rank": 5}, (8, None), id="the floor is rounded up"),
        pytest.param((24, 24), {"max_rank": 3}, (1, 2, 3, None), id="ceiling"),
        pytest.param((24, 24), {"rank_multiple": 16}, (None,), id="no multiple saves"),
        pytest.param((24, 24), {"min_rank": 12}, (None,), id="floor at break-even"),
        pytest.param((1, 9), {}, (None,), id="one row cannot shrink"),
        pytest.param((1, 1), {}, (None,), id="one value"),
        pytest.param((24, 24), {"fixed_rank": 5, "rank_multiple": 4, "min_rank": 8}, (5,), id="fixed"),
        pytest.param((24, 24), {"fixed_rank": 12}, (None,), id="a fixed rank that costs as much as dense"),
        pytest.param((24, 24), {"fixed_rank": 24}, (None,), id="a fixed full rank"),
    ],
)
def test_options(shape, bounds, expected):
    profile = layer("a", *shape, **bounds)

    assert profile.options == expected
    assert profile.candidate_ranks == tuple(option for option in expected if option is not None)
    assert (np.diff(profile.option_costs) > 0).all()
    assert (profile.option_losses[-1] == 0) == (expected[-1] is None)


@pytest.mark.parametrize("seed", range(20))
def test_options_follow_the_rules_one_by_one(seed):
    for profile in random_problem(seed).layers:
        assert list(profile.options) == allowed_ranks(profile)


def test_costs_and_losses():
    profile = layer("a", 6, 12)
    problem = AllocationProblem((profile, layer("b", 8, 8)), 60)

    assert profile.cost(2) == 2 * (6 + 12)
    assert profile.cost(None) == 6 * 12
    assert profile.loss(3) == pytest.approx(0.5)
    assert profile.loss(None) == 0
    assert profile.break_even == 3
    assert problem.min_cost == 18 + 16
    assert problem.dense_cost == 72 + 64
    assert problem.total_cost({"a": 2, "b": None}) == 36 + 64
    assert problem.total_loss({"a": 3, "b": 2}) == pytest.approx(0.5 + 0.75)


def test_overriding_the_cost_changes_what_follows_from_it():
    class Pivoted(LayerProfile):
        def cost(self, rank):
            return self.dense_cost if rank is None else rank * (self.out_features + self.in_features) - rank**2

    profile = Pivoted("a", 8, 8, np.linspace(1, 0, 9))

    assert profile.break_even == 7
    assert profile.options == (1, 2, 3, 4, 5, 6, 7, None)
    assert profile.option_costs.tolist() == [15, 28, 39, 48, 55, 60, 63, 64]


@pytest.mark.parametrize(
    "bounds, message",
    [
        ({"fixed_rank": 9}, r"fixed_rank=9 of layer 'a' is outside \[1, 8\]"),
        ({"fixed_rank": 0}, r"fixed_rank=0 of layer 'a' is outside \[1, 8\]"),
        ({"min_rank": 0}, "min_rank=0 of layer 'a' is too small; give at least 1"),
        ({"rank_multiple": 0}, "rank_multiple=0 of layer 'a' is too small; give at least 1"),
        ({"max_rank": 3, "rank_multiple": 4}, "max_rank=3 of layer 'a' is below its smallest rank 4"),
        ({"losses": np.ones(8)}, "Layer 'a' of shape .* needs 9 losses, for ranks 0 to 8"),
        ({"losses": np.append(np.ones(8), np.nan)}, "Losses of layer 'a' hold NaN or Inf"),
        ({"losses": np.arange(9.0)}, "Losses of layer 'a' increase with the rank, by up to 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_layers_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        layer("a", 8, 12, **bounds)


def test_losses_may_increase_by_rounding_errors():
    layer("a", 8, 8, np.array([1, 0.5, 0.2, 0.1, 0, 0, 1e-17, 0, 1e-17]))


def test_a_repeated_name_is_refused():
    with pytest.raises(ValueError, match=r"The names \['a'\] belong to several layers"):
        AllocationProblem((layer("a", 8, 8), layer("b", 8, 8), layer("a", 4, 4)), 100)


def test_a_budget_below_the_smallest_ranks_is_refused():
    problem = AllocationProblem((layer("a", 8, 8), layer("b", 8, 8, min_rank=2)), 47)

    with pytest.raises(BudgetError, match=r"A budget of 47 stored values cannot be met: .* take 48") as caught:
        problem.check()
    assert (caught.value.budget, caught.value.min_cost) == (47, 48)
    AllocationProblem(problem.layers, 48).check()
