"""The way back: a compressed model as an ordinary dense one that needs no plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .modeling import FactoredLinear, replace_module


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replace_by_dense(model: nn.Module) -> int:
    """Replace, in place, every factored layer by the dense layer with the same function; return their number."""
    # All of them before the first is replaced, so that an error leaves the model as it was.
    dense = {name: module.to_linear() for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    for name, module in dense.items():
        replace_module(model, name, module)
    return len(dense)


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a compressed model, in place, into a standard dense model whose checkpoint needs no plugin.

    The function stays the same up to one rounding of `B A`; the parameters are as many as before the compression. The
    same as `model.dequantize()`.

    Raises:
        ValueError: if the model holds no factored layer, or an adapter or a quantizer has taken a factor's place.
    """
    if not any(isinstance(module, FactoredLinear) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} holds no factored layer: it is dense already.")
    return model.dequantize()
