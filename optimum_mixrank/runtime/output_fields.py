"""What the output of a model holds, however it is nested: its fields by name, and the tensors in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor


_BESIDE = ("loss", "hidden_states", "attentions", "past_key_values", "cache")
"""Ends of the names of outputs that say nothing about the result."""


def fields_of(output: Any) -> Mapping[str, Any]:
    """Return the fields of an output by name; none of a tensor or a tuple."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    return vars(output) if is_dataclass(output) else {}


def field_of(output: Any, name: str) -> Any:
    """Return a field of an output, or None; a dot leads into a field that has fields of its own."""
    value = output
    for part in name.split("."):
        # Transformers' outputs are mappings as well as objects; some attributes are deprecated names that warn when read.
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a value, except losses, hidden states, attentions and caches."""
    if isinstance(value, Tensor):
        if torch.is_floating_point(value):
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    else:
        for name, each in fields_of(value).items():
            if not name.endswith(_BESIDE):
                yield from tensors_in(each)


def per_image(tensors: Iterator[Tensor] | Sequence[Tensor], num_images: int | None) -> list[Tensor]:
    """Return the tensors with one row per image; a single number becomes a row."""
    fitting = [tensor for tensor in tensors if num_images is None or (tensor.ndim and len(tensor) == num_images)]
    return [tensor[:, None] if tensor.ndim == 1 else tensor for tensor in fitting]


def listed(output: Any) -> str:
    """Describe what an output holds, for messages."""
    names = [name for name, value in fields_of(output).items() if any(True for _ in tensors_in(value))]
    return ", ".join(f"`{name}`" for name in names) or "no named tensors"
