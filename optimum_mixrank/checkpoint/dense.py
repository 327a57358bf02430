"""Turn a compressed model back into an ordinary dense one that needs no plugin."""

from __future__ import annotations

from transformers import PreTrainedModel

from .modeling import FactoredLinear


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a compressed model, in place, into a standard dense model whose checkpoint needs no plugin.

    The function stays the same up to one rounding of `B A`, and the model has as many parameters again as the original.
    `model.dequantize()` does the same.

    Raises:
        ValueError: if the model holds no factored layer, or an adapter or a quantizer has replaced a factor.
    """
    if not any(isinstance(module, FactoredLinear) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} holds no factored layer: it is dense already.")
    return model.dequantize()
