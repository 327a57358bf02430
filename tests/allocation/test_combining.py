"""Options of layers that are decided together."""

import itertools

import numpy as np
import pytest

from optimum_mixrank.allocation.combining import combine, efficient, lower_hull


def random_curve(seed, size=9):
    generator = np.random.default_rng(seed)
    return generator.integers(1, 60, size), generator.uniform(0, 1, size)


@pytest.mark.parametrize("seed", range(20))
def test_efficient_options_are_those_that_no_other_one_beats(seed):
    costs, losses = random_curve(seed)
    kept = efficient(costs, losses)
    assert (np.diff(costs[kept]) > 0).all() and (np.diff(losses[kept]) < 0).all()
    for index in set(range(len(costs))) - set(kept.tolist()):
        assert any(costs[other] <= costs[index] and losses[other] <= losses[index] for other in kept)


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_holds_the_best_option_at_every_multiplier(seed):
    costs, losses = random_curve(seed)
    hull = lower_hull(costs, losses)
    for multiplier in np.geomspace(1e-4, 1, 40):
        best = (losses + multiplier * costs).min()
        assert (losses + multiplier * costs)[hull].min() == pytest.approx(best)
    slopes = np.diff(losses[hull]) / np.diff(costs[hull])
    assert (np.diff(slopes) > 0).all()


@pytest.mark.parametrize("seed", range(10))
def test_combinations_hold_the_best_one_at_every_multiplier(seed):
    curves = [random_curve(10 * seed + layer, size=6) for layer in range(3)]
    found = combine(curves)
    costs = sum(curve[0][found[:, layer]] for layer, curve in enumerate(curves))
    losses = sum(curve[1][found[:, layer]] for layer, curve in enumerate(curves))
    assert (np.diff(costs) > 0).all() and (np.diff(losses) < 0).all()
    everything = list(itertools.product(range(6), repeat=3))
    all_costs = np.array([sum(curve[0][i] for curve, i in zip(curves, each, strict=True)) for each in everything])
    all_losses = np.array([sum(curve[1][i] for curve, i in zip(curves, each, strict=True)) for each in everything])
    for multiplier in np.geomspace(1e-4, 1, 40):
        best = (all_losses + multiplier * all_costs).min()
        assert (losses + multiplier * costs).min() == pytest.approx(best)


def test_a_single_option():
    assert combine([(np.array([4]), np.array([0.5]))]).tolist() == [[0]]
