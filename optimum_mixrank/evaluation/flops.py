"""Arithmetic of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..checkpoint.modeling import PivotedLinear
from ..runtime.forward import black_image, evaluation_mode
from ..runtime.hooks import hooks_removed_on_exit


# Fused attention that torch's own counter does not know; on a CPU it would count no attention at all.
_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


def flops_per_image(model: nn.Module, pixel_values_shape: Sequence[int] | None = None) -> int:
    """FLOPs of one forward pass over one image.

    A multiply-add counts as two FLOPs. Counted are the products of linear layers (dense or factored), convolutions and
    attention; biases, norms, softmax and activations, which compression does not change, are not. Of a pivoted layer
    its two products are counted, as an exported model computes them; PyTorch itself adds one by the identity.
    The model runs once, on a black image, and is left as it was.

    Args:
        model: A model that takes `pixel_values`.
        pixel_values_shape: `(channels, height, width)`; default: what `model.config` says.

    Raises:
        ValueError: if the shape is not given and the configuration does not tell it, or is not of that form.
    """
    pixel_values = black_image(model, pixel_values_shape)
    # Where somebody listens to a factor, the layer computes by its two factors as they stand.
    listened = [module.factor_b for module in model.modules() if isinstance(module, PivotedLinear)]
    with (
        hooks_removed_on_exit([factor.register_forward_hook(lambda *_: None) for factor in listened]),
        evaluation_mode(model),
        FlopCounterMode(display=False, custom_mapping=_attention_mapping()) as counter,
    ):
        model(pixel_values=pixel_values)
    return counter.get_total_flops()


def tokens_per_image(
    model: nn.Module, names: Sequence[str], pixel_values_shape: Sequence[int] | None = None
) -> dict[str, int]:
    """How many vectors each of these linear layers maps for one image, by name; 0 for a layer that does not run.

    The model runs once, on a black image, and is left as it was.

    Args:
        model: A model that takes `pixel_values`.
        names: Module names of linear layers.
        pixel_values_shape: `(channels, height, width)`; default: what `model.config` says.

    Raises:
        ValueError: as `flops_per_image`.
    """
    counts = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            counts[name] += args[0].numel() // args[0].shape[-1]

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with hooks_removed_on_exit(handles), evaluation_mode(model):
        model(pixel_values=black_image(model, pixel_values_shape))
    return counts


def _attention_mapping() -> dict[Any, Callable[..., int]]:
    return {
        getattr(torch.ops.aten, name): _attention_flops for name in _FUSED_ATTENTION if hasattr(torch.ops.aten, name)
    }


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """FLOPs of `softmax(Q Kᵀ) V` from shapes `[batch, heads, tokens, features]`."""
    return sdpa_flop_count(query, key, value)
