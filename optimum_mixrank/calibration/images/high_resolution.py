"""The same images at a higher resolution than the model sees: an image processor whose sizes are multiplied."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any


STEPS = {"size": "do_resize", "crop_size": "do_center_crop"}
"""Sizes of an image processor, and whether it uses them."""

EDGES = frozenset({"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"})


def enlarged_processor(image_processor: Any, scale: float) -> Any | None:
    """A copy of an image processor whose images are `scale` times as large on each side, with the same view.

    Args:
        image_processor: The model's.
        scale: At least 1.

    Returns:
        The copy, or None where the processor has no sizes that could be multiplied.
    """
    # Where an image is cropped only, or resized by a rule of its own, a larger one would show something else.
    if not getattr(image_processor, "do_resize", True) or getattr(image_processor, "crop_pct", None) is not None:
        return None
    used = [name for name, step in STEPS.items() if _is_used(image_processor, name, step)]
    sizes = {name: _scaled(getattr(image_processor, name), scale) for name in used}
    if "size" not in sizes or any(size is None for size in sizes.values()):
        return None
    copied = copy.deepcopy(image_processor)
    for name, size in sizes.items():
        setattr(copied, name, size)
    return copied


def _is_used(image_processor: Any, name: str, step: str) -> bool:
    return getattr(image_processor, name, None) is not None and bool(getattr(image_processor, step, True))


def _scaled(size: Any, scale: float) -> Any:
    if isinstance(size, int | float):
        return math.ceil(size * scale)
    # A dict, or an object of Transformers that behaves like one; what is not given is None.
    items = size if isinstance(size, Mapping) else getattr(size, "__dict__", {})
    given = {key: value for key, value in items.items() if value is not None}
    if not given or not given.keys() <= EDGES:
        return None
    scaled = {key: math.ceil(value * scale) for key, value in given.items()}
    return scaled if isinstance(size, dict) else type(size)(**scaled)
