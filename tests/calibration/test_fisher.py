"""Fisher information against its definition: every label in turn, weighed by its probability."""

import pytest
import torch
from models import pixels, tiny_swin, tiny_vit
from torch import nn

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.collect import collect_statistics
from optimum_mixrank.calibration.fisher import GradientCollector, probe_likelihood
from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.decomposition import Statistic
from optimum_mixrank.runtime.forward import activation_gradients
from optimum_mixrank.runtime.outputs import ModelOutput


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.unused = nn.Linear(5, 2)
        self.outer = nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.inner(x)
        self.unused(hidden)
        return self.outer(torch.tanh(hidden))


def exact_fisher(model, x):
    """`E_y[g gᵀ]` of the inner layer, label by label."""
    total = torch.zeros(5, 5, dtype=torch.float64)
    for image in x:
        hidden = model.inner(image).detach().requires_grad_()
        log_p = model.outer(torch.tanh(hidden)).log_softmax(-1)
        for label in range(4):
            [g] = torch.autograd.grad(log_p[label], hidden, retain_graph=True)
            total += (log_p[label].exp() * torch.outer(g, g)).detach()
    return total / len(x)


def test_converges_to_the_definition():
    torch.manual_seed(0)
    model, x = Head().double(), torch.randn(8, 6, dtype=torch.float64)
    with GradientCollector(model, ["inner", "unused"], samples=2000) as collector, activation_gradients(model):
        collector.update(ModelOutput(logits=model(x.clone().requires_grad_())))
    expected = exact_fisher(model, x)
    assert (collector.moment("inner") - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(collector.moment("unused"), torch.zeros(2, 2, dtype=torch.float64))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.inner._forward_hooks


def test_probes_have_the_fisher_information_of_the_softmax():
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(2)
    draws = []
    for _ in range(20000):
        draws.append(torch.autograd.grad(probe_likelihood(ModelOutput(logits=logits), generator), logits)[0][0])
    draws = torch.stack(draws)
    p = logits.detach().softmax(-1)[0]
    assert (draws.T @ draws / len(draws) - (torch.diag(p) - torch.outer(p, p))).abs().max() < 0.01


def test_features_are_measured_relative_to_their_spread():
    feature = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for scale in (1.0, 1000.0):
        generator = torch.Generator().manual_seed(1)
        scaled = feature * scale
        [g] = torch.autograd.grad(probe_likelihood(ModelOutput(features=(scaled,)), generator), feature)
        # g = noise / (std √size): its energy per image is one over the variance of the features.
        assert g.square().sum() / 3 == pytest.approx(1 / float(feature.detach().var()), rel=0.5)


@pytest.mark.parametrize("singular", [False, True], ids=["full rank", "singular"])
def test_gradients_of_the_input_are_those_of_the_output_through_the_weight(singular):
    model, images = tiny_vit(), pixels(6)
    names = [target.name for target in encoder_linears(model) if target.shape[0] > target.shape[1]]
    if singular:
        with torch.no_grad():
            model.get_submodule(names[0]).weight[:, 3] = 0
    batches = [Batch(images[:2], index=0), Batch(images[2:], index=1)]
    of_input = {Statistic.INPUT_MEAN, Statistic.INPUT_GRADIENT_MOMENT, Statistic.GRADIENT_ENERGY}
    cheap, _ = collect_statistics(model, batches, dict.fromkeys(names, frozenset(of_input)))
    full, _ = collect_statistics(model, batches, dict.fromkeys(names, frozenset(Statistic)))
    for name in names:
        weight, moment = model.get_submodule(name).weight.detach().double(), full[name].gradient_moment
        for expected, found in (
            (weight.T @ moment @ weight, [cheap[name].input_gradient_moment, full[name].input_gradient_moment]),
            (moment.trace(), [cheap[name].gradient_energy, full[name].gradient_energy]),
        ):
            for each in found:
                torch.testing.assert_close(each, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert cheap[name].gradient_moment is None


@pytest.mark.parametrize("model", [tiny_vit(), tiny_swin(), tiny_swin().swin], ids=["vit", "swin", "no head"])
def test_calibration_delivers_it_and_leaves_the_model_alone(model):
    model.train()
    images = pixels(6)
    calibration = MixRankCompressor(model).calibrate([images], "kfac", structures=["rank"])
    for name, statistics in calibration.layers.items():
        layer = model.get_submodule(name)
        size = min(layer.out_features, layer.in_features)
        is_wide = layer.out_features > layer.in_features
        moment = statistics.require(Statistic.INPUT_GRADIENT_MOMENT if is_wide else Statistic.GRADIENT_MOMENT)
        assert moment.shape == (size, size) and torch.isfinite(moment).all()
        assert statistics.num_images == 6
        # Products are summed in float32.
        eigenvalues = torch.linalg.eigvalsh(moment)
        assert eigenvalues[0] >= -1e-5 * eigenvalues[-1]
    assert model.training and not images.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = MixRankCompressor(model).calibrate([images], "kfac", structures=["rank"])
    other = MixRankCompressor(model).calibrate([images], "kfac", seed=1, structures=["rank"])
    name = next(iter(calibration.layers))
    assert torch.equal(again.layers[name].gradient_moment, calibration.layers[name].gradient_moment)
    assert not torch.equal(other.layers[name].gradient_moment, calibration.layers[name].gradient_moment)


def test_the_gradients_of_a_joint_layer_are_those_of_its_parts_stacked():
    model = tiny_vit()
    parts = [target.name for target in encoder_linears(model)[:3]]
    batches = [Batch(pixels(4, seed), index=seed) for seed in range(2)]
    wanted = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.GRADIENT_MOMENT})
    statistics, _ = collect_statistics(model, batches, {"joint": wanted}, joints={"joint": parts})
    alone, _ = collect_statistics(model, batches, dict.fromkeys(parts, wanted))
    joint = statistics["joint"]
    assert joint.gradient_moment.shape == (96, 96)
    # Gradients of different layers at the same token belong together, hence the moment is no block matrix.
    assert joint.gradient_moment[:32, 32:].norm() > 0.01 * joint.gradient_moment[:32, :32].norm()
    assert (torch.linalg.eigvalsh(joint.gradient_moment) > -1e-9 * joint.gradient_moment.trace()).all()
    for position, part in enumerate(parts):
        rows = slice(32 * position, 32 * (position + 1))
        assert torch.allclose(joint.gradient_moment[rows, rows], alone[part].gradient_moment, rtol=1e-5, atol=1e-12)
        assert torch.equal(statistics[part].gradient_moment, joint.gradient_moment[rows, rows])
        assert torch.equal(statistics[part].input_covariance, joint.input_covariance)
    assert torch.allclose(joint.input_covariance, alone[parts[0]].input_covariance)
    assert joint.num_tokens == alone[parts[0]].num_tokens and joint.num_images == 8


def test_probes_of_distributions_have_the_fisher_information_of_the_mean_over_places():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, 3, generator=generator)
    probes = 20000
    logits = values.expand(probes, -1, -1).clone().requires_grad_()
    probe_likelihood(ModelOutput(distributions=(logits,), kind="segmentation"), generator).backward()
    gradients = logits.grad.double()
    p = values[0].double().softmax(-1)
    for place in range(2):
        found = gradients[:, place].T @ gradients[:, place] / probes
        # Two places, so that each has half of the weight.
        expected = (p[place].diag() - p[place].outer(p[place])) / 2
        assert torch.allclose(found, expected, atol=5e-3)
    assert (gradients[:, 0].T @ gradients[:, 1] / probes).abs().max() < 5e-3
