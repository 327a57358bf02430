"""The training loop of compensators."""

import pytest
import torch
from compensation.cases import config
from torch import nn

from optimum_mixrank.compensation.training.loop import Trainer


def trainer(layer, parameters, **changes):
    settings = config(**{"epochs": 3, "learning_rate": 0.1, "seed": 0, **changes})
    return Trainer(layer, [{"params": parameters}], settings, 2, "Distilling")


def test_the_best_state_is_kept_and_only_the_given_parameters_change():
    layer = nn.Linear(3, 1)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    errors = iter([5.0, 3.0, 4.0, 9.0])
    seen = []

    def error():
        seen.append(layer.bias.detach().clone())
        return next(errors)

    progress = trainer(layer, [layer.bias]).train(5, lambda i: layer(torch.ones(len(i), 3)).sum(), error)
    assert progress.errors == [5.0, 3.0, 4.0, 9.0] and progress.best_epoch == 1 and len(progress.losses) == 3
    assert torch.equal(layer.bias, seen[1]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(layer.weight, before)
    assert layer.bias.requires_grad and not layer.weight.requires_grad and layer.bias.grad is None


def test_a_training_that_only_does_harm_changes_nothing():
    layer = nn.Linear(3, 1)
    before = layer.bias.detach().clone()
    errors = iter([1.0, 2.0, 3.0, 4.0])
    trainer(layer, [layer.bias]).train(4, lambda i: layer(torch.ones(len(i), 3)).sum(), lambda: next(errors))
    assert torch.equal(layer.bias, before)


def test_every_image_is_seen_once_per_epoch():
    layer = nn.Linear(1, 1)
    seen = []

    def loss(indices):
        seen.extend(indices.tolist())
        return layer(torch.ones(1, 1)).sum()

    trainer(layer, [layer.bias], epochs=2).train(7, loss, lambda: 0.0)
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]


def test_a_loss_that_explodes_is_reported_with_the_learning_rate():
    layer = nn.Linear(2, 2)

    def loss(indices):
        return layer(torch.full((2, 2), 1e30)).square().sum() * 1e30

    with pytest.raises(ValueError, match=r"Distilling: the loss is inf in epoch 1; lower learning_rate=0\.9"):
        trainer(layer, list(layer.parameters()), epochs=2, learning_rate=0.9).train(4, loss, lambda: 0.0)
