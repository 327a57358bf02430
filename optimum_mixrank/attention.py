"""Which implementation of attention a model runs while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


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
