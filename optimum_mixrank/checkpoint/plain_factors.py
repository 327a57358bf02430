"""Pivoted layers as two plain factors of the same rank, for exported models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .composite import describe_factored_layers
from .modeling import LowRankLinear, replace_module
from .narrowing import mark_narrow, narrow_from
from .pivoted import PivotedLinear


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_plain_factors(model: PreTrainedModel) -> PreTrainedModel:
    """Store the pivoted layers of a model, in place, as plain factors of the same rank.

    An exported pivoted layer reorders its outputs in every pass. Plain factors have nothing to reorder: the second holds
    the pivot rows too, as rows of an identity, so that a layer takes `rank²` more values and as many more multiply-adds
    per token. The function stays the same up to rounding, and the result is a compressed model like any other.

    Args:
        model: The compressed model; layers that are not pivoted stay as they are.

    Raises:
        ValueError: if an adapter or a quantizer has replaced a factor.
    """
    # Only now: importing it registers the format with Transformers, which imports it in turn.
    from .quantizer import attach_configuration

    layers = {name: _plain(each) for name, each in model.named_modules() if isinstance(each, PivotedLinear)}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    if layers and getattr(model, "hf_quantizer", None) is not None:
        describe_factored_layers(model, attach_configuration)
    return model


@torch.no_grad()
def _plain(layer: PivotedLinear) -> LowRankLinear:
    plain = LowRankLinear.from_factors(layer.factor_a.weight, layer.second_factor(), layer.bias)
    trainable = layer.factor_b.weight.requires_grad
    for parameter in plain.parameters():
        parameter.requires_grad_(trainable)
    if (narrow := narrow_from(layer)) is not None:
        mark_narrow(plain, *narrow)
    return plain.train(layer.training)
