"""Channels whose variance is thousands of times that of the others do not change how the others are treated."""

import pytest
import torch

from optimum_mixrank.decomposition.anchored import anchored_weight
from optimum_mixrank.decomposition.damping import typical_scale
from optimum_mixrank.decomposition.two_sided import damped, decompose_two_sided


SIZE, TOKENS, RANK, RIDGE, DAMPING = 96, 4000, 24, 0.03, 0.01
OUTLIERS = [0, 1, 3, 5]


def moment(generator, orders):
    """A second moment whose eigenvalues cover so many orders of magnitude."""
    Q = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
    return SIZE * (Q * torch.logspace(0, -orders, SIZE, dtype=torch.float64)) @ Q.T


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_the_scale_is_the_mean_of_equal_channels_and_of_few(generator):
    assert typical_scale(torch.full((64,), 2.0)) == 2
    assert typical_scale(torch.tensor([1.0, 5.0])) == 3
    assert typical_scale(torch.zeros(64)) == 0
    usual = torch.rand(384, generator=generator, dtype=torch.float64)
    assert 0.9 < typical_scale(usual) / usual.mean() <= 1


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_the_scale_is_not_that_of_outliers(generator, outliers):
    usual = 1 + torch.rand(SIZE, generator=generator, dtype=torch.float64)
    planted = usual.clone()
    planted[:outliers] *= 1e4
    assert abs(typical_scale(planted) / typical_scale(usual) - 1) < 0.05
    if outliers:
        assert planted.mean() / usual.mean() > 100


def test_the_scale_of_a_moment_of_few_channels_is_a_share_of_the_mean():
    few = torch.zeros(64, dtype=torch.float64)
    few[:2] = 1.0
    assert typical_scale(few) == pytest.approx(1e-3 * float(few.mean()))


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_outlier_inputs_do_not_anchor_the_others(generator, outliers):
    W = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    inputs = torch.linalg.cholesky(moment(generator, 2)) @ torch.randn(
        SIZE, TOKENS, generator=generator, dtype=torch.float64
    )
    # Layers before this one have lost half of what lies in some directions.
    lost = torch.linalg.qr(torch.randn(SIZE, 12, generator=generator, dtype=torch.float64)).Q
    changed = inputs - 0.5 * lost @ (lost.T @ inputs)
    changed = changed + 0.05 * inputs.std() * torch.randn(SIZE, TOKENS, generator=generator, dtype=torch.float64)
    # The norm before it multiplies some channels by 100, and its weight divides them by 100.
    factors = torch.ones(SIZE, dtype=torch.float64)
    factors[:outliers] = 100
    W, inputs, changed = W / factors, factors[:, None] * inputs, factors[:, None] * changed
    S, St = changed @ changed.T / TOKENS, W @ inputs @ changed.T / TOKENS

    def error(weight):
        return float((W @ inputs - weight @ changed).square().mean())

    best = error(St @ torch.linalg.inv(S))
    assert error(W) > 5 * best
    assert error(anchored_weight(W, S, St, RIDGE)) < 1.3 * best
    if outliers > 1:
        by_the_mean = RIDGE * float(S.diagonal().mean() / typical_scale(S.diagonal()))
        assert error(anchored_weight(W, S, St, by_the_mean)) > 4 * best


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_outlier_gradients_cost_less_than_to_ignore_gradients(generator, outliers):
    W = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    S, F = moment(generator, 2), moment(generator, 2)
    factors = torch.ones(SIZE, dtype=torch.float64)
    factors[:outliers] = 100
    # The same layer with outputs in other units.
    W, F = W / factors[:, None], factors[:, None] * F * factors

    def loss(fisher):
        found = decompose_two_sided(W, fisher, S)
        rest = W - found.left[:, :RANK] @ found.right[:RANK]
        return float((F @ rest @ S * rest).sum())

    # Damped by a share of the mean, which is that of the outliers.
    damped_loss, least = loss(damped(F, DAMPING)), loss(F)
    assert damped_loss < (1.6 if outliers else 1.02) * least
    assert damped_loss < loss(torch.eye(SIZE, dtype=torch.float64))
