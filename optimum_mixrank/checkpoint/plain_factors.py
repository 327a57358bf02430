"""Factored layers as two plain factors of the same rank, for exported models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..decomposition.rotation import rotated_factors
from .composite import describe_factored_layers
from .modeling import FactoredLinear, LowRankLinear, replace_module
from .narrowing import mark_narrow, narrow_from
from .pivoted import PivotedLinear


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_plain_factors(model: PreTrainedModel, *, rotated: bool = False) -> PreTrainedModel:
    """Store the pivoted layers of a model, in place, as plain factors of the same rank.

    An exported pivoted layer reorders its outputs in every pass. Plain factors have nothing to reorder: the second holds
    the pivot rows too, as rows of an identity, so that a layer takes `rank²` more values and as many more multiply-adds
    per token. The function stays the same up to rounding, and the result is a compressed model like any other.

    Args:
        model: The compressed model; without `rotated`, layers that are not pivoted stay as they are.
        rotated: Whether to choose the basis between the factors for 8-bit products, in layers of plain factors too; see
            `decomposition.rotation`.

    Raises:
        ValueError: if an adapter or a quantizer has replaced a factor.
    """
    # Only now: importing it registers the format with Transformers, which imports it in turn.
    from .quantizer import attach_configuration

    kinds = (PivotedLinear, LowRankLinear) if rotated else PivotedLinear
    layers = {name: _plain(each, rotated) for name, each in model.named_modules() if isinstance(each, kinds)}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    if layers and getattr(model, "hf_quantizer", None) is not None:
        describe_factored_layers(model, attach_configuration)
    return model


@torch.no_grad()
def _plain(layer: FactoredLinear, rotated: bool) -> LowRankLinear:
    A, B = layer.factor_a.weight, layer.second_factor()
    if rotated:
        A, B = (factor.to(A.dtype) for factor in rotated_factors(A, B))
    plain = LowRankLinear.from_factors(A, B, layer.bias)
    trainable = layer.factor_b.weight.requires_grad
    for parameter in plain.parameters():
        parameter.requires_grad_(trainable)
    if (narrow := narrow_from(layer)) is not None:
        mark_narrow(plain, *narrow)
    return plain.train(layer.training)
