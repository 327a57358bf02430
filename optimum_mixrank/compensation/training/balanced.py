"""Represent factored layers by balanced factors while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...checkpoint.factorize import factored_linear
from ...checkpoint.modeling import FactoredLinear, LowRankLinear, replace_module
from ...checkpoint.narrowing import mark_narrow, narrow_from
from ...decomposition import balance
from ...runtime.precision import to_float64


@contextmanager
def balanced_factors(model: nn.Module) -> Iterator[list[str]]:
    """Represent compressed layers by balanced factors, for which one step size suits both, and restore their layout.

    A dense layer that has lost units is represented by factors of full rank. A model in half precision is trained in
    float32, in which small steps are not lost. After an exception all layers are as they were.

    Yields:
        Module names of the compressed layers; of those that share a factor, of the one that they share.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear) or (isinstance(module, nn.Linear) and narrow_from(module) is not None)
    }
    for name, layer in layers.items():
        replace_module(model, name, _balanced(layer))
    if dtype in (torch.float16, torch.bfloat16):
        model.to(torch.float32)
    try:
        yield list(layers)
    except BaseException:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        model.to(dtype)
        raise
    model.to(dtype)
    for name, old in layers.items():
        replace_module(model, name, _restored(model.get_submodule(name), old))


def _restored(trained: LowRankLinear, old: FactoredLinear | nn.Linear) -> FactoredLinear | nn.Linear:
    """Return trained factors in the form that the layer had."""
    layer: FactoredLinear | nn.Linear
    if isinstance(old, nn.Linear):
        layer = trained.to_linear()
        layer.weight.requires_grad_(old.weight.requires_grad)
    else:
        A, B = to_float64(trained.factor_a.weight), to_float64(trained.factor_b.weight)
        layer = factored_linear(trained.to_linear(), A, B, old.layout)
        before = dict(old.named_parameters())
        for key, parameter in layer.named_parameters():
            # A layer that is now stored in another layout may have other biases.
            parameter.requires_grad_(before.get(key, old.factor_a.weight).requires_grad)
    if (narrow := narrow_from(old)) is not None:
        mark_narrow(layer, *narrow)
    return layer.train(old.training)


def _balanced(layer: FactoredLinear | nn.Linear) -> LowRankLinear:
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.factor_a.weight
    A, B = (factor.to(weight) for factor in balance(*_factors(layer)))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return LowRankLinear.from_factors(A, B, bias).train(layer.training)


def _factors(layer: FactoredLinear | nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the weight, `A` and `B` with `W = B A`, in float64."""
    if isinstance(layer, nn.Linear):
        weight = to_float64(layer.weight)
        m, n = weight.shape
        identity = torch.eye(min(m, n), dtype=weight.dtype, device=weight.device)
        return (weight, identity) if m <= n else (identity, weight)
    return to_float64(layer.factor_a.weight), to_float64(layer.second_factor())
