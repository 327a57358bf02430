"""Selection of hidden units, against its definition."""

import pytest
import torch

from optimum_mixrank.decomposition.width import UnitSelection, held_to_weights, select_units, solved_for_units


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


def hidden_units(tokens, units=40, inputs=30, seed=0):
    """Return hidden units of an MLP at some tokens, centred, `[tokens, units]`."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(inputs, units, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    hidden = torch.relu(torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ first)
    return hidden - hidden.mean(dim=0)


def test_the_penalty_is_the_distance_to_the_original_weights():
    tokens = 25
    hidden = hidden_units(tokens)
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    held = held_to_weights(hidden.T @ hidden / tokens, tokens)
    kept = torch.tensor([0, 3, 4, 17, 20, 39])
    # Least squares over tokens and, weighted, over the distance of every weight to its original value.
    share = 0.003 * 40 / tokens
    anchors = torch.diag((share * tokens * hidden.square().mean(dim=0)).sqrt())
    rows, targets = torch.cat([hidden, anchors]), torch.cat([hidden @ weight.T, anchors @ weight.T])
    expected = torch.linalg.lstsq(rows[:, kept], targets).solution.T
    assert torch.allclose(solved_for_units(held, weight @ held, kept), expected, rtol=1e-6)


def test_weights_stay_moderate_with_fewer_tokens_than_units():
    tokens, weight = 20, torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden, unseen = hidden_units(tokens), hidden_units(2000, seed=1)
    moment = hidden.T @ hidden / tokens

    def error(moment):
        selected = select_units(moment, weight @ moment, 20).order
        narrow = solved_for_units(moment, weight @ moment, selected)
        return float((unseen[:, selected] @ narrow.T - unseen @ weight.T).square().mean()), float(narrow.abs().max())

    (plain, _), (held, largest) = error(moment), error(held_to_weights(moment, tokens))
    assert held < plain / 2
    assert largest < 3 * float(weight.abs().max())


def test_many_tokens_decide_alone():
    moment = moments()[0]
    assert torch.allclose(held_to_weights(moment, 10**9), moment, rtol=1e-9)
    assert torch.equal(held_to_weights(moment * 0, 0), moment * 0)
