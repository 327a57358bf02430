"""The training loop and the form in which factors are trained."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images
from torch import nn

from optimum_mixrank import FactoredLinear, LowRankLinear
from optimum_mixrank.compensation.training.loop import TrainingSettings, balanced_factors, train
from optimum_mixrank.compensation.training.relative import relative_loss


def settings(**changes):
    return TrainingSettings(**{"epochs": 3, "learning_rate": 0.1, "batch_size": 2, "seed": 0, **changes})


def test_the_best_state_is_kept_and_only_the_named_parameters_move():
    layer = nn.Linear(3, 1)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    errors = iter([5.0, 3.0, 4.0, 9.0])
    seen = []

    def error():
        seen.append(layer.bias.detach().clone())
        return next(errors)

    history = train(
        layer, [{"params": [layer.bias]}], 5, lambda i: layer(torch.ones(len(i), 3)).sum(), error, settings(), "test"
    )
    assert history.errors == [5.0, 3.0, 4.0, 9.0] and history.best_epoch == 1 and len(history.losses) == 3
    assert torch.equal(layer.bias, seen[1]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(layer.weight, before)
    assert layer.bias.requires_grad and not layer.weight.requires_grad and layer.bias.grad is None


def test_a_training_that_only_harms_changes_nothing():
    layer = nn.Linear(3, 1)
    before = layer.bias.detach().clone()
    errors = iter([1.0, 2.0, 3.0, 4.0])
    train(
        layer,
        [{"params": [layer.bias]}],
        4,
        lambda i: layer(torch.ones(len(i), 3)).sum(),
        lambda: next(errors),
        settings(),
        "test",
    )
    assert torch.equal(layer.bias, before)


def test_every_image_is_seen_once_per_epoch():
    layer = nn.Linear(1, 1)
    seen = []

    def loss(indices):
        seen.extend(indices.tolist())
        return layer(torch.ones(1, 1)).sum()

    train(layer, [{"params": [layer.bias]}], 7, loss, lambda: 0.0, settings(epochs=2), "test")
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_balanced_factors_are_the_same_function_in_between_and_afterwards(layout):
    model, _ = compress(FAMILIES["vit"](), config(compensation=[], layout=layout))
    model = model.double().eval()
    x = images(3).double()
    with torch.no_grad():
        before = model(x).logits
        kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
        with balanced_factors(model) as names:
            assert set(names) == set(kinds)
            torch.testing.assert_close(model(x).logits, before, rtol=1e-8, atol=1e-8)
            for name in names:
                layer = model.get_submodule(name)
                A, B = layer.factor_a.weight, layer.factor_b.weight
                assert isinstance(layer, LowRankLinear)
                torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(model(x).logits, before, rtol=1e-8, atol=1e-8)
    after = {name: type(module) for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    assert after == kinds


def test_relative_loss():
    reference = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)) + 100
    assert relative_loss(reference, reference) == 0
    # To predict every feature's mean is an error of 1.
    mean = reference.flatten(0, 1).mean(0).expand_as(reference)
    assert relative_loss(reference, mean).item() == pytest.approx(1, rel=1e-3)
