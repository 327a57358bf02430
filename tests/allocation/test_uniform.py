"""Uniform allocation keeps the same share of every layer and ignores losses."""

import numpy as np
import pytest
from allocation.problems import layer, random_problem

from optimum_mixrank.allocation import AllocationProblem, LayerProfile, UniformAllocator


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.75])
def test_every_layer_keeps_the_share(share):
    shapes = [(384, 384), (384, 1536), (1536, 384), (96, 288), (100, 37)]
    layers = tuple(layer(f"{m}x{n}", m, n) for m, n in shapes)
    problem = AllocationProblem(layers, int(share * sum(m * n for m, n in shapes)))

    ranks = UniformAllocator().allocate(problem)

    largest_step = max(m + n for m, n in shapes)
    for profile in layers:
        step = profile.out_features + profile.in_features
        above = profile.cost(ranks[profile.name]) - share * profile.dense_cost
        # Rounding down takes less than a step; what is too little for the largest layers goes to smaller ones.
        assert -step < above <= step + largest_step


def test_equal_layers_get_equal_ranks_and_the_remainder_goes_step_by_step():
    layers = tuple(layer(name, 24, 24) for name in "abcd")

    assert UniformAllocator().allocate(AllocationProblem(layers, 4 * 5 * 48)) == {"a": 5, "b": 5, "c": 5, "d": 5}
    assert UniformAllocator().allocate(AllocationProblem(layers, 4 * 5 * 48 + 2 * 48 + 47)) == {
        "a": 6,
        "b": 6,
        "c": 5,
        "d": 5,
    }


def test_bounds_hold_and_the_others_keep_one_share():
    layers = (layer("floor", 24, 24, min_rank=8), layer("ceiling", 24, 24, max_rank=2), layer("a", 24, 24))

    assert UniformAllocator().allocate(AllocationProblem(layers, (8 + 2 + 5) * 48)) == {
        "floor": 8,
        "ceiling": 2,
        "a": 5,
    }


@pytest.mark.parametrize("seed", range(10))
def test_losses_are_ignored(seed):
    problem = random_problem(seed)
    blind = []
    for profile in problem.layers:
        bounds = {name: getattr(profile, name) for name in LayerProfile.__dataclass_fields__ if name != "losses"}
        blind.append(LayerProfile(losses=np.zeros_like(profile.losses), **bounds))

    assert UniformAllocator().allocate(problem) == UniformAllocator().allocate(
        AllocationProblem(tuple(blind), problem.budget)
    )
