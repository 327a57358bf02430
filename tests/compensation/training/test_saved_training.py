"""A training that is interrupted between two steps continues as if nothing had happened."""

import pytest
import torch
from compensation.cases import config
from torch import nn

from optimum_mixrank.compensation.training.loop import Trainer
from optimum_mixrank.compensation.training.whitening import WhitenedAdam
from optimum_mixrank.runtime.journal import Journal


class Interruption(Exception):  # noqa: N818 - not an error of the training
    pass


def train(directory=None):
    """Return the parameters and history of a training with random inputs, saved before every step."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.5)
    generator = torch.Generator().manual_seed(1)

    def loss(indices):
        return layer(torch.randn(len(indices), 3, generator=generator)).square().mean()

    def error():
        with torch.no_grad():
            return float(layer(torch.ones(1, 3)).square().mean())

    settings = config(epochs=3, learning_rate=0.05, seed=0)
    groups = [{"params": list(layer.parameters())}]
    journal = Journal(directory, interval=0.0)
    progress = Trainer(layer, groups, settings, 2, "Training", journal=journal, generators=[generator]).train(
        5, loss, error
    )
    return [parameter.detach() for parameter in layer.parameters()], progress


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_resumed_training_gives_the_same_result(tmp_path, monkeypatch, steps):
    expected, progress = train()
    step, taken = WhitenedAdam.step, []

    def interrupted(self, closure=None):
        if len(taken) == steps:
            raise Interruption
        taken.append(1)
        step(self)

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(WhitenedAdam, "step", interrupted)
        train(tmp_path)
    parameters, resumed = train(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert (resumed.losses, resumed.errors) == (progress.losses, progress.errors)
