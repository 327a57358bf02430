"""Turn a compressed model back into an ordinary dense one that needs no plugin."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from .entries import compressed_layers
from .modeling import FactoredLinear
from .narrowing import mark_narrow, narrow_from, widened
from .shared import SharedLinear


def to_dense(model: PreTrainedModel, keep_widths: bool = False) -> PreTrainedModel:
    """Turn a compressed model, in place, into a standard dense model whose checkpoint needs no plugin.

    The function stays the same up to one rounding of `B A`, and the model has as many parameters again as the original.
    `model.dequantize()` does the same.

    Args:
        model: The compressed model.
        keep_widths: Whether MLPs that have lost hidden units keep their present width, and with it fewer parameters. The
            checkpoint then needs no plugin only if a plain configuration describes the widths; see `make_plain`.

    Raises:
        ValueError: if the model holds no compressed layer, or an adapter or a quantizer has replaced a factor.
    """
    if getattr(model, "is_self_contained", False):
        raise ValueError(
            f"This {type(model).__name__} was opened with the code in its checkpoint, whose layers this package does not "
            "know; open it without `trust_remote_code`."
        )
    if not compressed_layers(model):
        raise ValueError(f"This {type(model).__name__} holds no factored layer: it is dense already.")
    quantizer = getattr(model, "hf_quantizer", None)
    if not keep_widths or quantizer is None:
        # Without a quantizer Transformers raises its own error.
        return model.dequantize()
    return cast("PreTrainedModel", quantizer.dequantize(model, keep_widths=True))


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
