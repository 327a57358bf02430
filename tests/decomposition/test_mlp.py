"""MLPs under the two-sided measure, against its definition."""

import dataclasses
import itertools

import pytest
import torch

from optimum_mixrank.decomposition import LayerStatistics
from optimum_mixrank.decomposition.mlp import TwoSidedMlp, rows_of_units


def positive(size, seed):
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


def make_mlp(n=6, units=16, m=5, chunks=1, seed=0):
    """Return an MLP with random weights and statistics of random inputs that passed through its activation."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, n, generator=generator, dtype=torch.float64)
    first = torch.randn(chunks * units, n, generator=generator, dtype=torch.float64)
    second = torch.randn(m, units, generator=generator, dtype=torch.float64)
    outputs = inputs @ first.T
    hidden = torch.relu(outputs[:, :units]) * (outputs[:, units:] if chunks == 2 else 1.0)
    return TwoSidedMlp(
        first,
        second,
        torch.cov(inputs.T, correction=0),
        torch.cov(hidden.T, correction=0),
        positive(chunks * units, 1),
        positive(m, 2),
        first_scale=3.0,
        second_scale=2.0,
    ).selected()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("width", [1, 3, 8, 15, 16])
def test_losses_are_those_of_the_layers_that_are_made(width, chunks):
    mlp = make_mlp(chunks=chunks)
    [found] = mlp.losses([width])
    units = mlp.units(width)
    narrow = mlp.narrowed_second(units)
    change = mlp.second_weight.clone()
    change[:, units] -= narrow
    expected = mlp.second_scale * float((mlp.second_fisher @ change @ mlp.hidden_covariance @ change.T).trace())
    assert found.width_loss == pytest.approx(expected, rel=1e-6, abs=1e-9)

    rows = rows_of_units(units, len(mlp.first_weight), mlp.num_units)
    for decomposition, tails, weight, fisher, covariance, scale in (
        (
            mlp.first_decomposition(units),
            found.first,
            mlp.first_weight[rows],
            mlp.first_fisher[rows][:, rows],
            mlp.input_covariance,
            mlp.first_scale,
        ),
        (
            mlp.second_decomposition(units),
            found.second,
            narrow,
            mlp.second_fisher,
            mlp.hidden_covariance[units][:, units],
            mlp.second_scale,
        ),
    ):
        assert len(tails) == min(weight.shape) + 1
        for rank in range(1, min(weight.shape)):
            A, B = decomposition.factors(rank)
            change = weight - B @ A
            expected = scale * float((fisher @ change @ covariance @ change.T).trace())
            # Losses only serve to compare structures, and are computed in float32.
            assert float(tails[rank]) == pytest.approx(expected, rel=1e-3, abs=1e-4 * float(tails[0]))


def test_losses_of_several_widths_are_those_of_each():
    mlp = make_mlp(chunks=2)
    for found in mlp.losses([2, 5, 9, 16]):
        [alone] = mlp.losses([found.width])
        assert found.width_loss == alone.width_loss
        assert torch.allclose(found.first, alone.first, rtol=1e-4, atol=1e-4 * float(alone.first[0]))
        assert torch.allclose(found.second, alone.second)


def test_losses_fall_with_the_width_and_full_width_loses_nothing():
    losses = [each.width_loss for each in make_mlp().losses(range(1, 17))]
    assert all(before >= after for before, after in itertools.pairwise(losses))
    assert losses[-1] == 0


def test_units_without_use_fill_up():
    mlp = make_mlp()
    silent = mlp.hidden_covariance.clone()
    silent[10:], silent[:, 10:] = 0, 0
    mlp = dataclasses.replace(mlp, hidden_covariance=silent).selected()
    units = mlp.units(13)
    assert len(units) == 13 and set(range(10)) <= set(units.tolist())
    narrow = mlp.narrowed_second(units)
    assert torch.isfinite(narrow).all()
    # They add nothing.
    assert narrow[:, 10:].count_nonzero() == 0


def test_a_prediction_that_does_not_depend_on_the_mlp():
    statistics = [
        LayerStatistics(
            600,
            num_images=100,
            input_covariance=covariance,
            gradient_moment=torch.zeros(size, size, dtype=torch.float64),
        )
        for covariance, size in ((positive(6, 3), 16), (positive(16, 4), 5))
    ]
    mlp = make_mlp()
    found = TwoSidedMlp.of((mlp.first_weight, mlp.second_weight), tuple(statistics), 0.01).selected().losses([4, 16])
    assert all(each.width_loss == 0 and each.first.sum() == 0 and each.second.sum() == 0 for each in found)


def test_scales_are_half_the_tokens_per_image():
    statistics = [
        LayerStatistics(600, num_images=100, input_covariance=positive(n, 3), gradient_moment=positive(size, 5))
        for n, size in ((6, 16), (16, 5))
    ]
    mlp = make_mlp()
    found = TwoSidedMlp.of((mlp.first_weight, mlp.second_weight), tuple(statistics), 0.01)
    assert (found.first_scale, found.second_scale) == (3.0, 3.0)


@pytest.mark.parametrize("size", [1e-40, 1e30])
def test_gradients_of_any_size(size):
    mlp = make_mlp()
    scaled = dataclasses.replace(
        mlp, first_fisher=mlp.first_fisher * size, second_fisher=mlp.second_fisher * size
    ).selected()
    for found, expected in zip(scaled.losses([4, 16]), mlp.losses([4, 16]), strict=True):
        assert torch.allclose(found.first / size, expected.first, rtol=1e-3)
        assert torch.allclose(found.second / size, expected.second, rtol=1e-3)
