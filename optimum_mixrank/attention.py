"""Which implementation of attention a model runs while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def fast_attention_for_training(*models: nn.Module) -> Iterator[None]:
    """Plain products in place of fused attention where that is the faster one: on the CPU, on the way back.

    The fused kernel of the CPU is made for the way there; with tokens as few as those of images its way back takes
    longer than all linear layers together in bfloat16. Afterwards the models are as they were.
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
    if before != "sdpa" or not is_on_cpu or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
