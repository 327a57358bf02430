"""Hold factored layers as balanced factors while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...checkpoint.factorize import factored_linear
from ...checkpoint.modeling import FactoredLinear, LowRankLinear, replace_module
from ...decomposition import balance
from ...runtime.precision import to_float64


@contextmanager
def balanced_factors(model: nn.Module) -> Iterator[list[str]]:
    """Hold factored layers as balanced factors, in which steps of one size suit both; afterwards in their own layout.

    A model in half precision is trained in float32, since small steps would be lost. After an exception the layers are
    as they were.

    Yields:
        Names of the factored layers.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
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
        trained = model.get_submodule(name)
        A, B = to_float64(trained.factor_a.weight), to_float64(trained.factor_b.weight)
        layer = factored_linear(trained.to_linear(), A, B, old.layout)
        before = dict(old.named_parameters())
        for key, parameter in layer.named_parameters():
            # A layer that is stored otherwise than before may have other biases.
            parameter.requires_grad_(before.get(key, old.factor_a.weight).requires_grad)
        replace_module(model, name, layer.train(old.training))


def _balanced(layer: FactoredLinear) -> LowRankLinear:
    if isinstance(layer, LowRankLinear):
        A, B = to_float64(layer.factor_a.weight), to_float64(layer.factor_b.weight)
    else:
        # The pivot rows times the identity and the coefficients.
        A = to_float64(layer.factor_a.weight)
        identity = torch.eye(layer.rank, dtype=A.dtype, device=A.device)
        B = torch.cat([identity, to_float64(layer.factor_b.weight)]).index_select(0, layer.order.to(A.device))
    weight = layer.factor_a.weight
    A, B = (factor.to(weight) for factor in balance(A, B))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return LowRankLinear.from_factors(A, B, bias).train(layer.training)
