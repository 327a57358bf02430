"""Where a model in half precision leaves the range of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.forward import evaluation_mode
from ..runtime.hooks import hooks_removed_on_exit


@dataclass(frozen=True)
class LargestActivation:
    """The largest absolute output of a layer, over all layers and images, and the layer's name."""

    layer: str
    value: float


def find_overflow(model: nn.Module, pixel_values: Tensor) -> str | None:
    """Return where the first activations of a forward pass are NaN or Inf, in words, or None if all are finite.

    Args:
        model: The model, in its half precision.
        pixel_values: `[batch, channels, height, width]`, in the same dtype.
    """
    found: list[str] = []

    def look(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        if found:
            return
        if not all(map(_is_finite, inputs)):
            found.append(f"before `{name}`")
        elif not _is_finite(output):
            found.append(f"in `{name}`")

    with _observed(model, look):
        model(pixel_values=pixel_values)
    return found[0] if found else None


def find_largest_activation(model: nn.Module, pixel_values: Tensor) -> LargestActivation:
    """Return the largest activation of a forward pass; float16 ends at 65,504.

    Args:
        model: The model, in float32.
        pixel_values: `[batch, channels, height, width]`.
    """
    largest = LargestActivation("", 0.0)

    def look(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            value = output.abs().max().item()
            if value > largest.value:
                largest = LargestActivation(name, value)

    with _observed(model, look):
        model(pixel_values=pixel_values)
    return largest


@contextmanager
def _observed(model: nn.Module, look: Callable[[str, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call a function with the name, the inputs and the output of each module without submodules, as it is called."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = (
        module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
        for name, module in leaves
    )
    with hooks_removed_on_exit(handles), evaluation_mode(model):
        yield


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
