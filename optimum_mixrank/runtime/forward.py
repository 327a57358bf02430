"""Run a model for what it computes, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, every module is in training mode or not, as it was before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def activation_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients by activations alone: no parameter collects any, and all are as trainable afterwards as before."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def black_image(model: nn.Module, pixel_values_shape: Sequence[int] | None = None) -> torch.Tensor:
    """An image of the size that a model takes, `[1, channels, height, width]`, on its device and in its dtype.

    Raises:
        ValueError: as `flops_per_image`.
    """
    shape = configured_shape(model) if pixel_values_shape is None else tuple(pixel_values_shape)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise ValueError(f"pixel_values_shape={shape} is not (channels, height, width).")
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    # Parameters that are offloaded to disk are on the meta device; Accelerate then moves the input itself.
    device = next((parameter.device for parameter in parameters if not parameter.is_meta), torch.device("cpu"))
    return torch.zeros(1, *shape, device=device, dtype=parameters[0].dtype if parameters else None)


def configured_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of an image as the model's configuration gives it, `(channels, height, width)`.

    Raises:
        ValueError: if it gives none.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(
            f"The configuration of {type(model).__name__} has image_size={size!r}, no size of images; pass "
            "`pixel_values_shape=(channels, height, width)`."
        )
    return getattr(config, "num_channels", 3), *size


MOST_TOKENS = 256
"""Plain products were faster with 64 and with 196."""


@contextmanager
def fast_attention_for_training(*models: nn.Module) -> Iterator[None]:
    """Plain products in place of fused attention where they are faster: on the CPU, on the way back, with few tokens.

    The fused kernel of the CPU is made for the way there; with few tokens its way back takes longer than all linear
    layers together in bfloat16. Plain products hold `tokens²` values for every head and layer. Afterwards the models are
    as they were.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_plain_on_cpu(model))
        yield


@contextmanager
def _plain_on_cpu(model: nn.Module) -> Iterator[None]:
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    can_be_set = getattr(model, "_can_set_attn_implementation", lambda: False)
    if before != "sdpa" or not is_on_cpu or not _has_few_tokens(config) or not can_be_set():
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _has_few_tokens(config: Any) -> bool:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return isinstance(image, int) and isinstance(patch, int) and (image // patch) ** 2 <= MOST_TOKENS
