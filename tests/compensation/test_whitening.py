"""Whitened coordinates, Adam in them, and the groups that a compressed model is trained in."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images
from torch import nn

from optimum_mixrank import FactoredLinear
from optimum_mixrank.compensation.training.groups import factor_groups, vector_group
from optimum_mixrank.compensation.training.loop import balanced_factors
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


def test_parameters_without_gradient_stay():
    parameter = nn.Parameter(torch.ones(2))
    WhitenedAdam([parameter], lr=0.1).step()
    assert torch.equal(parameter.detach(), torch.ones(2))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_groups_hold_what_is_trained_and_leave_the_function_as_it_was(family):
    model, _ = compress(FAMILIES[family](), config(compensation=[]))
    model.eval()
    batch = images(8)
    with torch.no_grad():
        before = model(batch).logits
    with balanced_factors(model) as names:
        groups = factor_groups(model, names, batch, 4, 0)
        vectors = vector_group(model, names, model.base_model)
        with torch.no_grad():
            torch.testing.assert_close(model(batch).logits, before, rtol=1e-4, atol=1e-5)
        grouped = {id(p) for pair in groups.values() for group in pair for p in group["params"]}
        grouped |= {id(p) for p in vectors["params"]}
        layers = {name for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
        norms = {name for name, module in model.base_model.named_modules() if isinstance(module, nn.LayerNorm)}
        prefix = f"{model.base_model_prefix}."
        expected = {
            id(parameter)
            for name, parameter in model.named_parameters()
            if parameter.numel()
            and (
                any(name.startswith(f"{layer}.") for layer in layers)
                or any(name.startswith(f"{prefix}{norm}.") for norm in norms)
            )
        }
        assert grouped == expected
        assert all(
            parameter.requires_grad and parameter.grad is None for parameter in model.parameters() if parameter.numel()
        )


def test_layers_with_one_input_share_its_coordinates():
    model, _ = compress(FAMILIES["vit"](), config(compensation=[]))
    with balanced_factors(model) as names:
        groups = factor_groups(model.eval(), names, images(8), 8, 0)
        matrices = {id(group["right"]) for pair in groups.values() for group in pair if "right" in group}
        assert len(matrices) < len(groups)
