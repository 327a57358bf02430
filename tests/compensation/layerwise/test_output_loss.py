"""The output loss from moments against its definition."""

import torch
from torch.testing import assert_close

from optimum_mixrank.compensation.layerwise.output_loss import output_loss, output_loss_of_factors


def random(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).double() for shape in shapes]


def test_output_loss_is_the_squared_error_of_the_outputs_up_to_a_constant():
    X, T, W = random((5, 40), (4, 40), (4, 5))
    expected = (T - W @ X).square().sum() / 40
    assert_close(output_loss(W, X @ X.T / 40, T @ X.T / 40) + T.square().sum() / 40, expected)


def test_output_loss_of_factors_is_that_of_their_product():
    A, B, X, T = random((2, 5), (4, 2), (5, 40), (4, 40))
    moments = X @ X.T / 40, T @ X.T / 40
    assert_close(output_loss_of_factors(A, B, *moments), output_loss(B @ A, *moments))
