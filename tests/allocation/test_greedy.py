"""The gradual greedy search against the paper's steps, written out rank by rank in exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from allocation.problems import allowed_ranks, layer, random_problem, tail_losses

from optimum_mixrank.allocation import AllocationProblem, GreedyAllocator


def written_out(problem, gamma, steps):
    """Ranks by the formulas: τ(t), Δ, r' = ⌊r - Δ / (m + n)⌋; then the remainder by best return."""
    layers = problem.layers
    fixed = [len(allowed_ranks(p)) == 1 for p in layers]
    # The real rank at which factors take what the dense layer takes; a layer that cannot move keeps its own.
    dense = [Fraction(p.dense_cost, p.out_features + p.in_features) for p in layers]
    ranks = [
        Fraction(allowed_ranks(p)[0]) if only and allowed_ranks(p)[0] is not None else start
        for p, only, start in zip(layers, fixed, dense, strict=True)
    ]

    def cost():
        return sum(r * (p.out_features + p.in_features) for p, r in zip(layers, ranks, strict=True))

    start = cost()
    t = 0
    while cost() > problem.budget:
        t += 1
        tau = Fraction(problem.budget)
        if t <= steps:
            tau += (start - problem.budget) * Fraction(math.exp(-t / gamma))
        delta = cost() - tau
        if delta <= 0:
            continue
        lowest = None
        for index, profile in enumerate(layers):
            floor = allowed_ranks(profile)[0]
            if fixed[index] or ranks[index] == floor:
                continue
            multiple = profile.rank_multiple
            target = ranks[index] - delta / (profile.out_features + profile.in_features)
            target = max(math.floor(target / multiple) * multiple, floor)
            if profile.max_rank is not None:
                target = min(target, profile.max_rank // multiple * multiple)
            if lowest is None or profile.losses[target] < lowest[0]:
                lowest = profile.losses[target], index, target
        ranks[lowest[1]] = Fraction(lowest[2])

    final = [None if r == full else int(r) for r, full in zip(ranks, dense, strict=True)]
    while True:
        left = problem.budget - sum(p.cost(r) for p, r in zip(layers, final, strict=True))
        best = None
        for index, profile in enumerate(layers):
            allowed = allowed_ranks(profile)
            for rank in allowed[allowed.index(final[index]) + 1 :]:
                price = profile.cost(rank) - profile.cost(final[index])
                rate = (profile.loss(final[index]) - profile.loss(rank)) / price
                if price <= left and (best is None or rate > best[0]):
                    best = rate, index, rank
        if best is None:
            return {p.name: r for p, r in zip(layers, final, strict=True)}
        final[best[1]] = best[2]


@pytest.mark.parametrize("gamma, steps", [(80.0, 500), (5.0, 20), (80.0, 0)], ids=["paper", "short", "no schedule"])
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_search_written_out(seed, gamma, steps):
    problem = random_problem(seed, layers=6, sizes=(12, 16, 24, 35))

    assert GreedyAllocator(gamma, steps).allocate(problem) == written_out(problem, gamma, steps)


def test_defaults_are_the_published_values():
    problem = random_problem(1, layers=6, sizes=(24, 35))

    assert GreedyAllocator().allocate(problem) == GreedyAllocator(gamma=80, max_steps=500).allocate(problem)


def test_the_layer_that_loses_least_gives():
    rng = np.random.default_rng(0)
    layers = tuple(
        layer(name, 24, 24, tail_losses(rng, 24) * scale) for name, scale in [("dear", 100.0), ("cheap", 1.0)]
    )

    ranks = GreedyAllocator().allocate(AllocationProblem(layers, 576 + 2 * 48))

    assert ranks == {"dear": None, "cheap": 2}


def test_ties_go_to_the_earlier_layer():
    layers = tuple(layer(name, 24, 24) for name in "ab")

    # One step has to go: the schedule is over, so a single layer gives all of it.
    ranks = GreedyAllocator(max_steps=0).allocate(AllocationProblem(layers, 2 * 576 - 48))

    assert ranks == {"a": 11, "b": None}
