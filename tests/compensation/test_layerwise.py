"""Layer-wise steps against float64 references from the activations themselves."""

import pytest
import torch
from compensation.cases import FAMILIES, config, images

from optimum_mixrank import FactoredLinear, MixRankCompressor
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.held_out import split_batches
from optimum_mixrank.compensation.layerwise.output_loss import output_loss
from optimum_mixrank.compensation.layerwise.residual import ResidualCompensator
from optimum_mixrank.compensation.layerwise.sequential import SequentialCompensator
from optimum_mixrank.decomposition import anchored_weight, decompose_by_input, root_of_covariance


SEED = 5


def run(family, step, **changes):
    """Original and compressed model, what came of the step, and the images that it has learned from, mirrored ones too."""
    original = FAMILIES[family]()
    settings = config(compensation=[step], metric="second_moment", layout="factors", seed=SEED, **changes)
    compressor = MixRankCompressor(original)
    batches = list(images(256).split(32))
    compressed = compressor.compress(settings, batches)
    [result] = compressor.report.compensation
    learn, _ = split_batches(dict(enumerate(batches)), settings.held_out_ratio, SEED)
    seen = torch.cat(list(learn.values()))
    return original.eval(), compressed.eval(), result, torch.cat([seen, seen.flip(-1)])


@torch.no_grad()
def activations(model, name, pixels):
    """Inputs and outputs of a layer, `[tokens, n]` and `[tokens, m]`, float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    model(pixel_values=pixels)
    handle.remove()
    [(inputs, outputs)] = seen
    return inputs.double().flatten(0, -2), outputs.double().flatten(0, -2)


def spread(values, centred):
    return (values - values.mean(0) * centred).square().sum()


@pytest.mark.parametrize(("family", "step"), [("vit", "sequential"), ("vit", "residual"), ("swin", "residual")])
def test_errors_of_layers_are_those_of_their_outputs(family, step):
    original, compressed, result, pixels = run(family, step)
    assert result["kept"]
    found = result["details"]["layer_errors"]
    # Of "sequential" only those that do not write to the residual stream have their own output as target.
    targets = [
        target
        for target in encoder_linears(original)
        if target.canonical_name in found
        and (step == "residual" or any(part in target.canonical_name for part in ("query", "key", "value", "fc1")))
    ]
    assert len(targets) >= 5
    for target in targets:
        wanted = activations(original, target.name, pixels)[1]
        # Its predecessors are final: the inputs are those that it was made for.
        ours = activations(compressed, target.name, pixels)[1]
        has_bias = target.module.bias is not None
        expected = spread(wanted - ours, has_bias) / spread(wanted, has_bias)
        assert found[target.canonical_name] == pytest.approx(float(expected), rel=1e-3)
        if has_bias:
            torch.testing.assert_close(ours.mean(0), wanted.mean(0), rtol=0, atol=1e-4)


def test_a_sequential_layer_is_the_anchored_solution_for_its_own_inputs():
    original, compressed, _, pixels = run("vit", "sequential")
    layers = [target for target in encoder_linears(original) if target.name.endswith(("query", "q_proj"))]
    for target in layers:
        x, y = activations(original, target.name, pixels)
        ours = activations(compressed, target.name, pixels)[0]
        layer = compressed.get_submodule(target.name)
        assert isinstance(layer, FactoredLinear)
        centred = ours - ours.mean(0)
        moment, cross = centred.T @ centred / len(ours), (y - y.mean(0)).T @ centred / len(ours)
        weight = target.module.weight.double()
        best = anchored_weight(weight, moment, cross, SequentialCompensator().ridge)
        A, B = decompose_by_input(best, root_of_covariance(moment)).factors(layer.rank)
        error = (centred @ (layer.product() - B @ A).T).square().sum() / (centred @ best.T).square().sum()
        assert error < 1e-6
        # It is for the inputs that the layer really gets: those of the original would give another.
        if target is not layers[0]:
            assert not torch.allclose(x, ours, atol=1e-3)


def test_training_lowers_the_loss_to_that_of_the_best_factors():
    generator = torch.Generator().manual_seed(0)
    m, n, rank, q = 12, 10, 6, 2
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, n, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.linspace(0.2, 2, n).double()
    )
    moment = inputs.T @ inputs / 200
    # Targets that no weight gives exactly: the original's outputs, with other inputs than ours.
    target = weight @ moment + 0.05 * torch.randn(m, n, generator=generator, dtype=torch.float64) @ moment
    start = decompose_by_input(weight, root_of_covariance(moment)).factors(rank - q)
    A, B = ResidualCompensator()._train(start, q, moment, target, torch.Generator().manual_seed(1))
    assert A.shape == (rank, n) and B.shape == (m, rank) and A.dtype == torch.float64
    before, after = (float(output_loss(b @ a, moment, target)) for a, b in (start, (A, B)))
    least_squares = torch.linalg.solve(moment, target.T).T
    a, b = decompose_by_input(least_squares, root_of_covariance(moment)).factors(rank)
    best = float(output_loss(b @ a, moment, target))
    assert best <= after < before
    assert after - best < 0.01 * (before - best)


def test_outcomes_of_residuals_are_counted():
    *_, result, _ = run("vit", "residual")
    outcomes = result["details"]["outcomes"]
    assert sum(outcomes.values()) == result["details"]["layers"] and outcomes["trained"] > 0


def test_a_residual_that_brings_nothing_leaves_the_layer(monkeypatch):
    monkeypatch.setattr(ResidualCompensator, "_train", lambda self, start, q, *moments: (start[0] * 0, start[1] * 0))
    monkeypatch.setattr(
        "optimum_mixrank.compensation.layerwise.residual.decompose_by_input",
        lambda weight, root: decompose_by_input(weight * 0, root),
    )
    *_, result, _ = run("vit", "residual")
    outcomes = result["details"]["outcomes"]
    assert outcomes["as it was"] > 0 and "trained" not in outcomes
