"""What every allocator guarantees: the budget, the bounds and determinism; and their registry."""

import numpy as np
import pytest
from allocation.problems import allowed_ranks, layer, random_problem, tail_losses, unspent_steps

from optimum_mixrank.allocation import (
    ALLOCATORS,
    AllocationProblem,
    Allocator,
    BudgetError,
    raise_evenly,
    spend_remainder,
)


NAMES = ["uniform", "greedy", "global"]


@pytest.fixture(params=NAMES)
def allocator(request):
    return ALLOCATORS.create(request.param)


@pytest.mark.parametrize("seed", range(60))
def test_budget_is_met_to_less_than_a_step(allocator, seed):
    problem = random_problem(seed)

    ranks = allocator.allocate(problem)

    assert list(ranks) == [profile.name for profile in problem.layers]
    assert all(ranks[profile.name] in allowed_ranks(profile) for profile in problem.layers)
    assert problem.total_cost(ranks) <= problem.budget
    assert unspent_steps(problem, ranks) == []
    assert allocator.allocate(problem) == ranks


def test_the_tightest_and_the_loosest_budget(allocator):
    layers = random_problem(0).layers
    least, most = AllocationProblem(layers, 0).min_cost, AllocationProblem(layers, 0).dense_cost

    assert allocator.allocate(AllocationProblem(layers, least)) == {p.name: allowed_ranks(p)[0] for p in layers}
    assert allocator.allocate(AllocationProblem(layers, most)) == {p.name: allowed_ranks(p)[-1] for p in layers}
    with pytest.raises(BudgetError, match="cannot be met"):
        allocator.allocate(AllocationProblem(layers, least - 1))


def test_fixed_ranks_and_layers_that_cannot_shrink(allocator):
    layers = (
        layer("fixed", 24, 24, fixed_rank=3),
        layer("fixed at no saving", 8, 8, fixed_rank=4),
        layer("one row", 1, 30),
        layer("free", 24, 24),
    )

    ranks = allocator.allocate(AllocationProblem(layers, 3 * 48 + 64 + 30 + 7 * 48 + 20))

    assert ranks == {"fixed": 3, "fixed at no saving": None, "one row": None, "free": 7}


def test_no_layers(allocator):
    assert allocator.allocate(AllocationProblem((), 0)) == {}


def test_the_budget_is_spent_even_if_no_rank_loses_anything(allocator):
    layers = tuple(layer(name, 24, 24, np.zeros(25)) for name in "abc")
    problem = AllocationProblem(layers, 3 * 6 * 48)

    assert problem.total_cost(allocator.allocate(problem)) == problem.budget


@pytest.mark.parametrize("scale", [1e-12, 1e12], ids=["tiny losses", "huge losses"])
@pytest.mark.parametrize("seed", range(5))
def test_the_unit_of_the_losses_does_not_matter(allocator, seed, scale):
    def problem(unit):
        rng = np.random.default_rng(seed)
        layers = tuple(layer(str(i), 24, 36, tail_losses(rng, 24, unit * (i + 1))) for i in range(5))
        return AllocationProblem(layers, 2000)

    assert allocator.allocate(problem(1.0)) == allocator.allocate(problem(scale))


def test_hundreds_of_large_layers(allocator):
    rng = np.random.default_rng(0)
    layers = tuple(layer(str(i), 384, 1536 if i % 3 else 384, tail_losses(rng, 384)) for i in range(100))
    problem = AllocationProblem(layers, int(0.4 * sum(profile.dense_cost for profile in layers)))

    ranks = allocator.allocate(problem)

    assert 0 <= problem.budget - problem.total_cost(ranks) < 384 + 1536
    assert unspent_steps(problem, ranks) == []


def test_spending_prefers_the_best_return_and_falls_back_on_the_smallest_share():
    steep, flat = np.array([1, 0.9, 0.2] + [0.0] * 10), np.array([1, 0.8, 0.7] + [0.7] * 9 + [0.0])
    layers = (layer("flat", 12, 12, flat), layer("steep", 12, 12, steep))
    start = np.array([0, 0])

    # The options are ranks 1 to 5, then dense at the cost of rank 6.
    assert spend_remainder(AllocationProblem(layers, 3 * 24), start).tolist() == [0, 1]
    assert spend_remainder(AllocationProblem(layers, 5 * 24), start).tolist() == [1, 2]
    assert raise_evenly(AllocationProblem(layers, 3 * 24), start).tolist() == [1, 0]
    assert raise_evenly(AllocationProblem(layers, 5 * 24), start).tolist() == [2, 1]
    assert start.tolist() == [0, 0]


def test_registry(monkeypatch):
    assert list(ALLOCATORS) == ["uniform", "greedy", "global"]
    monkeypatch.setattr(ALLOCATORS, "_classes", dict(ALLOCATORS))

    @ALLOCATORS.register
    class Smallest(Allocator):
        name = "smallest"

        def allocate(self, problem):
            return {profile.name: profile.options[0] for profile in problem.layers}

    assert ALLOCATORS.create("smallest").allocate(AllocationProblem((layer("a", 8, 8),), 64)) == {"a": 1}
    with pytest.raises(ValueError, match="allocation='smallest' is registered already"):
        ALLOCATORS.register(Smallest)
    with pytest.raises(
        ValueError, match="allocation='best' is unknown; choose one of 'uniform', 'greedy', 'global', "
    ):
        ALLOCATORS.create("best")
