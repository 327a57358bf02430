"""A budget of time: allocation by a table of latencies."""

import itertools
import re

import numpy as np
import pytest
import torch
from allocation.problems import tail_losses
from allocation.tables import block_table, dense_seconds, factored_seconds

from optimum_mixrank.allocation import ALLOCATORS
from optimum_mixrank.allocation.budget import RankBudget
from optimum_mixrank.allocation.costs import MeasuredTime, TimedProfile
from optimum_mixrank.allocation.specs import LayerSpec, MlpSpec, SharedInputSpec
from optimum_mixrank.decomposition.mlp import WidthLosses


ALLOCATIONS = sorted(ALLOCATORS)
TOKENS = 17
BLOCK = [
    *(LayerSpec(name, 32, 32, TOKENS) for name in ("query", "key", "value", "output")),
    LayerSpec("fc1", 64, 32, TOKENS),
    LayerSpec("fc2", 32, 64, TOKENS),
]
SHARED = SharedInputSpec("query+key+value", ("query", "key", "value"))
MLP = MlpSpec("fc1 > fc2", ("fc1",), "fc2")


def make_budget(target=0.7, sites=(SHARED, MLP), table=None, **changes):
    costs = MeasuredTime(table or block_table(blocks=1))
    return RankBudget(BLOCK, costs.model_cost, 1 - target, layout="pivoted", costs=costs, sites=sites, **changes)


def losses(seed=0):
    rng = np.random.default_rng(seed)
    found = {layer.name: tail_losses(rng, 32) for layer in BLOCK}
    return {**found, SHARED.name: tail_losses(rng, 32, 2.0)}


def mlp_losses(budget, seed=0):
    rng = np.random.default_rng(seed)
    tails = [torch.from_numpy(tail_losses(rng, min(width, 32))) for width in budget.widths(64) for _ in "ab"]
    widths = enumerate(budget.widths(64))
    return {
        MLP.name: [
            WidthLosses(width, 0.3 * (1 - width / 64) ** 2, tails[2 * index], tails[2 * index + 1])
            for index, width in widths
        ]
    }


def seconds_of(choices):
    """Return the time of the chosen layers, by the formula of the table."""
    total, done = 0.0, set()
    width = choices["fc1"].width or 64
    shapes = {"fc1": (width, 32), "fc2": (32, width)}
    for name, choice in choices.items():
        if choice.shared and name in SHARED.members:
            if SHARED.name not in done:
                total += factored_seconds(96, 32, choice.rank, TOKENS)
                done.add(SHARED.name)
            continue
        shape = shapes.get(name, (32, 32))
        dense = choice.rank is None
        total += dense_seconds(*shape, TOKENS) if dense else factored_seconds(*shape, choice.rank, TOKENS)
    return total


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("target", [0.6, 0.75, 0.95])
@pytest.mark.parametrize("sites", [(), (SHARED,), (MLP,), (SHARED, MLP)], ids=["rank", "shared", "width", "all"])
def test_the_whole_model_keeps_the_target(allocation, target, sites):
    table = block_table(blocks=1)
    budget = make_budget(target, sites, table)
    budget.check()
    found = budget.allocate(losses(), allocation, mlp_losses(budget))
    share = (seconds_of(found.choices) + table.rest_seconds) / table.model_seconds
    # Times of widths and ranks that were measured are met; all are rounded to nanoseconds.
    assert share <= target + 1e-4
    assert budget.kept_of_model(found) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_optimum_of_all_combinations(seed):
    budget = make_budget(0.72, sites=(), rank_multiple=8)
    found = budget.allocate(losses(seed), "global")
    problem = budget.problem(losses(seed))
    options = [list(zip(p.option_costs.tolist(), p.option_losses.tolist(), strict=True)) for p in problem.layers]
    best, largest = np.inf, max(p.option_losses.max() for p in problem.layers)
    for combination in itertools.product(*options):
        if sum(cost for cost, _ in combination) <= problem.budget:
            best = min(best, float(np.sum([loss for _, loss in combination], dtype=np.float64)))
    assert best - 1e-12 <= found.loss <= best + 0.05 * largest


def test_ranks_that_are_slower_than_the_dense_layer_are_left_out():
    profile = make_budget(sites=()).problem(losses()).layers[0]
    assert isinstance(profile, TimedProfile)
    times = {rank: factored_seconds(32, 32, rank, TOKENS) for rank in range(1, 32)}
    fast = [rank for rank, seconds in times.items() if seconds < dense_seconds(32, 32, TOKENS)]
    lowest = profile.min_rank
    assert list(profile.options) == [*range(lowest, max(fast) + 1), None]
    assert max(fast) < 31
    assert (np.diff(profile.option_costs) > 0).all()


def test_of_ranks_that_cost_the_same_only_the_highest_is_an_option():
    times = np.array([5, 5, 5, 5, 5, 9, 9, 9, 9])
    profile = TimedProfile("a", 8, 8, np.linspace(1, 0, 9), "pivoted", dense_time=12, rank_times=times)
    assert profile.options == (4, 7, None)
    assert profile.option_costs.tolist() == [5, 9, 12]
    even = TimedProfile("a", 8, 8, np.linspace(1, 0, 9), "pivoted", rank_multiple=3, dense_time=9, rank_times=times)
    assert even.options == (3, None)


@pytest.mark.parametrize("sites", [(), (SHARED, MLP)], ids=["rank", "all"])
@pytest.mark.parametrize("floors", [{}, {"min_rank": 12}, {"min_rank_ratio": 0.5, "rank_multiple": 8}], ids=str)
def test_the_target_that_an_error_names_is_the_smallest_that_can_be_reached(sites, floors):
    with pytest.raises(ValueError, match="target_latency=0.05 cannot be reached: by the table") as error:
        make_budget(0.05, sites, **floors).check()
    smallest = float(re.search(r"smallest target_latency that can be reached is ([\d.]+);", str(error.value))[1])
    assert "everything else takes 0.333" in str(error.value)
    reachable = make_budget(smallest, sites, **floors)
    reachable.check()
    for allocation in ALLOCATIONS:
        found = reachable.allocate(losses(), allocation, mlp_losses(reachable))
        assert found.cost <= reachable.budget
        with pytest.raises(ValueError, match="cannot be reached"):
            make_budget(smallest - 0.002, sites, **floors).allocate(losses(), allocation, mlp_losses(reachable))


def test_nothing_can_get_faster():
    layers = [LayerSpec("query", 32, 32, TOKENS, ratio=0)]
    costs = MeasuredTime(block_table(blocks=1))
    budget = RankBudget(layers, costs.model_cost, 0.5, costs=costs)
    with pytest.raises(ValueError, match="No layer can get faster at all"):
        budget.check()


def test_a_share_of_the_targets():
    budget = make_budget(0.6)
    part = RankBudget(**{**vars(budget), "compression_scope": "targets"})
    found = part.allocate(losses(), "global", mlp_losses(part))
    assert part.kept(found) <= 0.6
    with pytest.raises(
        ValueError, match=r"compression_ratio=0.999 \(of the targets\) cannot be reached: .* nanoseconds"
    ):
        RankBudget(**{**vars(part), "compression_ratio": 0.999}).check()


def test_a_fixed_rank_that_saves_no_time(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("optimum_mixrank"), "propagate", True)
    layers = [LayerSpec("query", 32, 32, TOKENS, rank=31), *BLOCK[1:]]
    costs = MeasuredTime(block_table(blocks=1))
    RankBudget(layers, costs.model_cost, 0.2, layout="pivoted", costs=costs).check()
    assert "rank 31 to layer 'query', which takes no less time than the dense layer" in caplog.text
