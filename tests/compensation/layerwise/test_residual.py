"""LWEC, the layer-wise error compensation of the paper."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images
from compensation.layerwise.cases import run
from models import tiny_deit
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.layerwise.output_loss import output_loss
from optimum_mixrank.compensation.layerwise.residual import ResidualCompensator
from optimum_mixrank.decomposition import METRICS, decompose_by_input, root_of_covariance


@pytest.fixture
def few_steps(monkeypatch):
    """Enough steps to lower the loss."""
    monkeypatch.setattr(ResidualCompensator.__init__, "__defaults__", (0.25, 60, 0.05))


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


@pytest.mark.parametrize("build", [FAMILIES["vit"], lambda: tiny_deit(qkv_bias=False)], ids=["bias", "no bias"])
@pytest.mark.usefixtures("few_steps")
def test_the_term_of_the_paper_is_added_to_the_decomposition_on_the_mean_input(build, monkeypatch):
    """The trained layers are `B A + G Yᵀ` with `B A` of rank r - q from the original model's representative input."""
    share, trained = 0.25, {}
    train = ResidualCompensator._train_term

    def recorded(self, start, q, *moments):
        A, B = train(self, start, q, *moments)
        assert torch.equal(A[:-q], start[0]) and torch.equal(B[:, :-q], start[1])
        trained[len(trained)] = (start[1] @ start[0], q)
        return A, B

    monkeypatch.setattr(ResidualCompensator, "_train_term", recorded)
    model, batches = build(), list(images(256).split(32))
    settings = config(metric="mean_input", compensation=["residual"], layout="factors")
    compressor = MixRankCompressor(model)
    compressor.compress(settings, batches)
    [result] = compressor.report.compensation
    assert result["kept"] and result["details"]["outcomes"] == {"trained": len(trained)}
    calibration, metric = MixRankCompressor(model).calibrate(batches, "mean_input"), METRICS.create("mean_input")
    ranks = {layer.name: layer.rank for layer in compressor.report.layers}
    factored = [target for target in encoder_linears(model) if ranks[target.canonical_name] is not None]
    assert len(factored) == len(trained)
    for target, (product, q) in zip(factored, trained.values(), strict=True):
        weight, rank = target.module.weight.detach().double(), ranks[target.canonical_name]
        statistics = calibration.layers[target.name]
        if target.module.bias is None:
            statistics = statistics.about_zero(weight)
        A, B = metric.decompose(weight, statistics).factors(rank - q)
        assert q == max(1, round(share * rank))
        torch.testing.assert_close(product, B @ A, rtol=1e-6, atol=1e-8)


def test_the_term_of_the_paper_comes_near_the_best_one():
    generator = torch.Generator().manual_seed(3)
    m, n, rank, q = 12, 10, 6, 2
    weight, inputs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (200, n)))
    moment = inputs.T @ inputs / 200
    start = decompose_by_input(weight, inputs[:3].T).factors(rank - q)
    rest = weight - start[1] @ start[0]
    A, B = ResidualCompensator()._train_term(start, q, moment, weight @ moment, seed=1)
    a, b = decompose_by_input(rest, root_of_covariance(moment)).factors(q)
    before, after, best = (
        float(output_loss(product, moment, weight @ moment))
        for product in (start[1] @ start[0], B @ A, start[1] @ start[0] + b @ a)
    )
    assert best <= after < before
    assert after - best < 0.01 * (before - best)


@pytest.mark.parametrize(("recipe", "family"), [("paper", "vit"), ("paper", "swin"), ("paper_second_moment", "vit")])
@pytest.mark.usefixtures("few_steps")
def test_recipes_of_the_paper_improve_and_reload(recipe, family, tmp_path):
    settings = MixRankConfig(recipe=recipe, compression_ratio=0.5, compression_scope="targets")
    model, report = compress(FAMILIES[family](), settings, 256)
    [result] = report.compensation
    assert result["kept"] and result["error_after"] < result["error_before"]
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    stored = reloaded.config.quantization_config
    assert (stored.recipe, stored.metric) == (recipe, "mean_input" if recipe == "paper" else "second_moment")
    with torch.no_grad():
        assert torch.equal(reloaded(images(2)).logits, model.eval()(images(2)).logits)


@pytest.mark.usefixtures("few_steps")
def test_statistics_from_before_serve_the_paper_too():
    model, batches = FAMILIES["vit"](), list(images(64).split(32))
    settings = config(metric="mean_input", compensation=["residual"], layout="factors")
    compressor = MixRankCompressor(model)
    calibration = compressor.calibrate(batches, ["mean_input", "second_moment"], structures=["rank"])
    given, own = (
        compressor.compress(settings, batches, calibration=calibration),
        compressor.compress(settings, batches),
    )
    assert all(torch.equal(*pair) for pair in zip(given.state_dict().values(), own.state_dict().values(), strict=True))


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
