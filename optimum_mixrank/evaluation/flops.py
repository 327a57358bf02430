"""Arithmetic of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..checkpoint.pivoted import PivotedLinear
from ..runtime.forward import evaluation_mode, frozen_parameters
from ..runtime.hooks import hooks_removed_on_exit
from ..runtime.outputs import PLAIN_CALL, ModelCall


# Fused attention that PyTorch's own counter does not know; on the CPU it would count no attention at all.
_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


def flops_per_image(model: nn.Module, call: ModelCall = PLAIN_CALL) -> int:
    """Count the FLOPs of one forward pass over one image; a multiply-add counts as two.

    The products of linear layers (dense or factored), convolutions and attention are counted. Biases, norms, softmax
    and activations are not: compression does not change them. For a pivoted layer its two products are counted, as an
    exported model computes them; PyTorch itself adds a product with the identity. The model runs once, on a black
    image or the first one of the call, and is left as it was.

    Args:
        model: A model that takes `pixel_values`, or whatever the call has as an example.
        call: How the model is called, and the images that it is tried on.

    Raises:
        ValueError: if the call has no example, and the configuration no image size.
    """
    image = call.example_for(model)[:1]
    attention = {
        getattr(torch.ops.aten, name): _attention_flops for name in _FUSED_ATTENTION if hasattr(torch.ops.aten, name)
    }
    # With a hook on one of its factors, a pivoted layer computes with both factors as they are.
    hooked = [module.factor_b for module in model.modules() if isinstance(module, PivotedLinear)]
    with (
        hooks_removed_on_exit([factor.register_forward_hook(lambda *_: None) for factor in hooked]),
        evaluation_mode(model),
        # The counter follows the gradients of whatever is given to a module, and some are given a parameter, such as the
        # query of a pooling head, which has none while the model only runs.
        frozen_parameters(model),
        FlopCounterMode(display=False, custom_mapping=attention) as counter,
    ):
        call.run(model, image)
    return counter.get_total_flops()


def tokens_per_image(
    model: nn.Module,
    names: Sequence[str],
    call: ModelCall = PLAIN_CALL,
) -> dict[str, int]:
    """Count the vectors that each of these linear layers maps for one image; 0 for a layer that does not run.

    Arguments and errors are those of `flops_per_image`; `names` are module names of linear layers.
    """
    counts = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            counts[name] += args[0].numel() // args[0].shape[-1]

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with hooks_removed_on_exit(handles), evaluation_mode(model):
        call.run(model, call.example_for(model)[:1])
    return counts


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count the FLOPs of `softmax(Q Kᵀ) V`, given shapes `[batch, heads, tokens, features]`."""
    return sdpa_flop_count(query, key, value)
