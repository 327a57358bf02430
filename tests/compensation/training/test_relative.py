"""Errors relative to the variance of features."""

import pytest
import torch

from optimum_mixrank.compensation.training.relative import relative_loss, token_variance


def features():
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)) + 100


def test_relative_loss_of_the_mean_is_one():
    reference = features()
    assert relative_loss(reference, reference) == 0
    mean = reference.flatten(0, 1).mean(0).expand_as(reference)
    assert relative_loss(reference, mean).item() == pytest.approx(1, rel=1e-3)


def test_token_variance_does_not_depend_on_how_tokens_are_split():
    reference = features()
    expected = reference.double().flatten(0, 1).var(dim=0, correction=0).mean()
    for sizes in ([4], [1, 3]):
        shares = [size / 4 for size in sizes]
        assert token_variance(reference.split(sizes), shares).item() == pytest.approx(float(expected), rel=1e-4)
