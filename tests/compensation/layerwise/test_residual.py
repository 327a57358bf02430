"""LWEC, the layer-wise error compensation of the paper."""

import torch
from compensation.layerwise.cases import run

from optimum_mixrank.compensation.layerwise.output_loss import output_loss
from optimum_mixrank.compensation.layerwise.residual import ResidualCompensator
from optimum_mixrank.decomposition import decompose_by_input, root_of_covariance


def test_training_lowers_the_loss_to_that_of_the_best_factors():
    generator = torch.Generator().manual_seed(0)
    m, n, rank, q = 12, 10, 6, 2
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, n, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.linspace(0.2, 2, n).double()
    )
    moment = inputs.T @ inputs / 200
    # Targets that no weight reaches exactly, as with the original's outputs for other inputs.
    target = weight @ moment + 0.05 * torch.randn(m, n, generator=generator, dtype=torch.float64) @ moment
    start = decompose_by_input(weight, root_of_covariance(moment)).factors(rank - q)
    A, B = ResidualCompensator()._train(start, q, moment, target, seed=1)
    assert A.shape == (rank, n) and B.shape == (m, rank) and A.dtype == torch.float64
    before, after = (float(output_loss(b @ a, moment, target)) for a, b in (start, (A, B)))
    least_squares = torch.linalg.solve(moment, target.T).T
    a, b = decompose_by_input(least_squares, root_of_covariance(moment)).factors(rank)
    best = float(output_loss(b @ a, moment, target))
    assert best <= after < before
    assert after - best < 0.01 * (before - best)


def test_outcomes_are_counted():
    *_, result, _ = run("vit", "residual")
    outcomes = result["details"]["outcomes"]
    assert sum(outcomes.values()) == result["details"]["layers"] and outcomes["trained"] > 0


def test_a_layer_that_training_does_not_improve_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(ResidualCompensator, "_train", lambda self, start, *_: (start[0] * 0, start[1] * 0))
    monkeypatch.setattr(
        "optimum_mixrank.compensation.layerwise.residual.decompose_by_input",
        lambda weight, root: decompose_by_input(weight * 0, root),
    )
    *_, result, _ = run("vit", "residual")
    outcomes = result["details"]["outcomes"]
    assert outcomes["as it was"] > 0 and "trained" not in outcomes
