"""Turn a compressed model back into an ordinary dense one that needs no plugin."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from .composite import describe_factored_layers
from .entries import compressed_layers
from .modeling import FactoredLinear, replace_module
from .narrowing import mark_narrow, narrow_from, widened
from .plain import make_plain
from .quantizer import attach_configuration
from .shared import SharedLinear


def to_dense(model: PreTrainedModel, keep_widths: bool = False) -> PreTrainedModel:
    """Turn a compressed model, in place, into a standard dense model whose checkpoint needs no plugin.

    The function stays the same up to one rounding of `B A`, and the model has as many parameters again as the original.
    `model.dequantize()` does the same.

    Args:
        model: The compressed model.
        keep_widths: Whether MLPs that have lost hidden units keep their present width, and with it fewer parameters than the
            original. The checkpoint needs no plugin then if a plain configuration describes the widths, which are the same
            in all blocks; see `make_plain`.

    Raises:
        ValueError: if the model holds no compressed layer, or an adapter or a quantizer has replaced a factor.
    """
    if not compressed_layers(model):
        raise ValueError(f"This {type(model).__name__} holds no factored layer: it is dense already.")
    if not keep_widths:
        return model.dequantize()
    # All products before the first replacement, so that an error leaves the model as it was.
    for name, module in dense_layers(model, keep_widths).items():
        replace_module(model, name, module)
    if not make_plain(model):
        describe_factored_layers(model, attach_configuration)
    return model


def dense_layers(model: nn.Module, keep_widths: bool = False) -> dict[str, nn.Linear]:
    """Return the dense layers that compute what the compressed layers of a model do, by module name.

    Args:
        model: The model.
        keep_widths: Whether layers that have lost units keep their present shape; if not, zeros take the places of these.

    Raises:
        ValueError: if an adapter or a quantizer has replaced a factor.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in compressed_layers(model).items():
        dense = module if isinstance(module, nn.Linear) else cast("FactoredLinear | SharedLinear", module).to_linear()
        narrow = narrow_from(module)
        if narrow is not None and keep_widths:
            mark_narrow(dense, *narrow)
        elif narrow is not None:
            dense = widened(dense, *narrow)
        found[name] = dense
    return found
