"""Selection of hidden units, against its definition."""

import pytest
import torch

from optimum_mixrank.decomposition.width import UnitSelection, select_units, solved_for_units


def moments(units=12, outputs=5, samples=60, seed=0):
    """Return the second moment of random hidden units, and that of random targets with them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, units, generator=generator, dtype=torch.float64)
    hidden = (
        hidden
        * torch.logspace(0, -2, units, dtype=torch.float64)
        @ torch.randn(units, units, generator=generator, dtype=torch.float64)
    )
    targets = hidden @ torch.randn(units, outputs, generator=generator, dtype=torch.float64)
    return hidden.T @ hidden / samples, targets.T @ hidden / samples, targets.T @ targets / samples


def error(hidden, cross, power, kept):
    """Return the mean squared error of the best linear prediction of the targets from some units."""
    kept = torch.tensor(kept, dtype=torch.int64)
    inner = hidden[kept][:, kept]
    return float(power.trace() - (cross[:, kept] @ torch.linalg.solve(inner, cross[:, kept].T)).trace())


def test_every_unit_is_the_one_that_lowers_the_error_most():
    hidden, cross, power = moments()
    order = select_units(hidden, cross).order.tolist()
    for step in range(len(order)):
        errors = {
            unit: error(hidden, cross, power, [*order[:step], unit]) for unit in range(12) if unit not in order[:step]
        }
        assert errors[order[step]] == pytest.approx(min(errors.values()), rel=1e-9, abs=1e-12)


def test_gains_add_up_to_the_error():
    hidden, cross, power = moments()
    selection = select_units(hidden, cross)
    left = float(power.trace()) - selection.gains().cumsum(0)
    for width in range(1, 13):
        kept = selection.kept(width).tolist()
        assert float(left[width - 1]) == pytest.approx(error(hidden, cross, power, kept), rel=1e-6, abs=1e-9)


def test_what_units_explain():
    hidden, cross, _ = moments()
    selection = select_units(hidden, cross)
    kept = selection.kept(4)
    weight = solved_for_units(hidden, cross, kept)
    expected = weight @ hidden[kept][:, kept] @ weight.T
    assert torch.allclose(selection.explained(4), expected, rtol=1e-6)


def test_the_second_layer_is_solved_for_the_units_that_stay():
    hidden, cross, _ = moments()
    kept = torch.tensor([1, 4, 7])
    weight = solved_for_units(hidden, cross, kept)
    # Normal equations: what is left of the targets is uncorrelated with the units.
    assert torch.allclose(weight @ hidden[kept][:, kept], cross[:, kept], rtol=1e-6)


def test_a_few_units():
    hidden, cross, _ = moments()
    assert select_units(hidden, cross, 3).order.tolist() == select_units(hidden, cross).order.tolist()[:3]
    assert select_units(hidden, cross, 100).order.tolist() == select_units(hidden, cross).order.tolist()


def test_units_that_are_combinations_of_others_are_not_selected():
    hidden, cross, power = moments(units=6)
    mixing = torch.zeros(6, 9, dtype=torch.float64)
    mixing[:, :6] = torch.eye(6)
    mixing[:, 6:] = torch.tensor([[1.0, 0, 2], [1, 1, 0], [0, 3, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    selection = select_units(mixing.T @ hidden @ mixing, cross @ mixing)
    assert len(selection.order) == 6
    assert float(selection.gains().sum()) == pytest.approx(float(power.trace()), rel=1e-6)


def test_units_that_never_vary():
    hidden, cross, _ = moments(units=4)
    wider, crossed = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
    wider[:4, :4], crossed[:, :4] = hidden, cross
    assert set(select_units(wider, crossed).order.tolist()) == {0, 1, 2, 3}
    assert select_units(wider * 0, crossed * 0).order.tolist() == []


def test_no_selection():
    assert UnitSelection.none().kept(0).tolist() == []
