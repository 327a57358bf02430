"""Whitened coordinates, and Adam in these."""

import pytest
import torch
from torch import nn

from optimum_mixrank.compensation.training.whitening import Roots, WhitenedAdam, whitened_balance


def moment(size, seed=0):
    x = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / (3 * size)


def test_roots_are_those_of_the_damped_moment():
    M = 7 * moment(5)
    roots = Roots.of(M, 0.1)
    expected = M / M.diagonal().mean() + 0.1 * torch.eye(5)
    torch.testing.assert_close(roots.root @ roots.root, expected, check_dtype=False)
    torch.testing.assert_close(roots.root @ roots.inverse, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("M", [torch.zeros(4, 4), torch.ones(4, 4)])
def test_roots_of_singular_moments_are_finite(M):
    roots = Roots.of(M, 0.01)
    torch.testing.assert_close(roots.root @ roots.inverse, torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


def test_factors_are_balanced_in_whitened_coordinates():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    B = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    inputs, outputs = Roots.of(moment(6), 0.01), Roots.of(moment(5, 1), 0.1)
    new_A, new_B, scale = whitened_balance(A, B, inputs, outputs)
    torch.testing.assert_close(new_B @ new_A, B @ A)
    whitened_A, whitened_B = new_A @ inputs.root, outputs.root @ new_B
    torch.testing.assert_close(whitened_A @ whitened_A.T, whitened_B.T @ whitened_B)
    assert scale == pytest.approx(
        torch.cat([whitened_A.flatten(), whitened_B.flatten()]).square().mean().sqrt().item()
    )


def descend(parameter, optimizer, loss, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return parameter.detach()


def test_without_coordinates_it_is_adam():
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for optimizer in (torch.optim.Adam, WhitenedAdam):
        parameter = nn.Parameter(torch.zeros(4, 3))
        found.append(descend(parameter, optimizer([parameter], lr=0.1), lambda p=parameter: (p - target).pow(4).sum()))
    torch.testing.assert_close(*found)


def test_in_coordinates_it_is_adam_on_the_coordinates():
    left, right = Roots.of(moment(4), 0.1).inverse, Roots.of(moment(3, 1), 0.1).inverse
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    descend(inner, torch.optim.Adam([inner], lr=0.1), lambda: (left @ inner @ right - target).pow(4).sum())
    outer = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = WhitenedAdam([{"params": [outer], "left": left, "right": right}], lr=0.1)
    descend(outer, optimizer, lambda: (outer - target).pow(4).sum())
    torch.testing.assert_close(outer.detach(), left @ inner.detach() @ right)


def test_parameters_without_a_gradient_do_not_change():
    parameter = nn.Parameter(torch.ones(2))
    WhitenedAdam([parameter], lr=0.1).step()
    assert torch.equal(parameter.detach(), torch.ones(2))
