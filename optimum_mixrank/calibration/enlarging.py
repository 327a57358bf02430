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
    copied = copy.deepcopy(image_processor)
    used = [name for name, step in STEPS.items() if getattr(copied, name, None) and getattr(copied, step, True)]
    for name in used:
        size = _scaled(getattr(copied, name), scale)
        if size is None:
            return None
        setattr(copied, name, size)
    return copied if used else None


def _scaled(size: Any, scale: float) -> Any:
    if isinstance(size, int | float):
        return math.ceil(size * scale)
    # A dict, or an object of Transformers that behaves like one; what is not given is None.
    items = dict(size if isinstance(size, Mapping) else vars(size))
    given = {key: value for key, value in items.items() if value is not None}
    if not given.keys() <= EDGES:
        return None
    scaled = {key: math.ceil(value * scale) for key, value in given.items()}
    return scaled if isinstance(size, dict) else type(size)(**scaled)
