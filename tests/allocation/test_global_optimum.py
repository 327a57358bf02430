"""The global allocation against brute force over all combinations."""

import numpy as np
import pytest
from allocation.problems import brute_force, dual_bound, largest_jump, layer, random_problem, tail_losses

from optimum_mixrank.allocation import AllocationProblem, GlobalAllocator, GreedyAllocator, UniformAllocator


SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_lies_between_the_optimum_and_the_provable_gap(seed):
    problem = random_problem(seed)
    optimum = brute_force(problem)

    found = problem.total_loss(GlobalAllocator().allocate(problem))

    assert dual_bound(problem) <= optimum + 1e-12
    assert optimum - 1e-12 <= found <= dual_bound(problem) + largest_jump(problem) + 1e-12


def test_exchanges_never_hurt_and_reach_most_optima():
    problems = [random_problem(seed) for seed in SEEDS]
    optimum = np.array([brute_force(problem) for problem in problems])
    plain = np.array([p.total_loss(GlobalAllocator(max_exchanges=0).allocate(p)) for p in problems])
    found = np.array([p.total_loss(GlobalAllocator().allocate(p)) for p in problems])

    assert (found <= plain + 1e-12).all()
    assert (found <= optimum + 1e-12).mean() >= 0.9
    assert (found <= optimum + 1e-12).sum() > (plain <= optimum + 1e-12).sum()


def test_beats_the_other_allocators_over_all_problems():
    problems = [random_problem(seed, layers=8, sizes=(12, 16, 24, 35)) for seed in SEEDS]

    def mean_loss(allocator):
        return np.mean([problem.total_loss(allocator.allocate(problem)) for problem in problems])

    assert mean_loss(GlobalAllocator()) < 0.95 * mean_loss(GreedyAllocator())
    assert mean_loss(GlobalAllocator()) < 0.9 * mean_loss(UniformAllocator())


@pytest.mark.parametrize("seed", range(20))
def test_is_the_optimum_where_losses_are_convex_and_all_steps_cost_the_same(seed):
    rng = np.random.default_rng(seed)
    layers = []
    for index in range(4):
        # m + n divides m n, and the loss is zero from break-even on: dense is one more step of the same cost.
        m, n = [(6, 12), (12, 6)][index % 2]
        losses = np.append(tail_losses(rng, 4, rng.uniform(0.1, 5)), np.zeros(2))
        layers.append(layer(str(index), m, n, losses))
    problem = AllocationProblem(tuple(layers), int(rng.integers(4 * 18, 16 * 18 + 1)))

    found = problem.total_loss(GlobalAllocator().allocate(problem))

    assert found == pytest.approx(brute_force(problem), rel=1e-12, abs=1e-15)


def test_a_layer_stays_dense_where_that_wins():
    # The loss hardly falls before break-even: factors are a bad bargain for this layer.
    stubborn = np.linspace(1.0, 0.9, 25)
    docile = np.append(1.0, np.full(24, 0.001))
    layers = (layer("stubborn", 24, 24, stubborn), layer("docile", 24, 24, docile))

    ranks = GlobalAllocator().allocate(AllocationProblem(layers, 576 + 48))

    assert ranks == {"stubborn": None, "docile": 1}
