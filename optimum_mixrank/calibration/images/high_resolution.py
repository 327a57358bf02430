"""The same images at a higher resolution than the model sees: an image processor with larger sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any


STEPS = {"size": "do_resize", "crop_size": "do_center_crop"}
"""Sizes of an image processor, and the attribute that says whether it uses them."""

EDGES = frozenset({"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"})


def enlarged_processor(image_processor: Any, scale: float) -> Any | None:
    """Return a copy of an image processor whose images show the same, `scale` (at least 1) times as large on each side.

    Returns None if the processor has no sizes that can be multiplied.
    """
    # If images are only cropped, or resized by a rule of the processor's own, a larger one would show something else.
    if not getattr(image_processor, "do_resize", True) or getattr(image_processor, "crop_pct", None) is not None:
        return None
    sizes = {
        name: _scaled(size, scale)
        for name, step in STEPS.items()
        if (size := getattr(image_processor, name, None)) is not None and getattr(image_processor, step, True)
    }
    if "size" not in sizes or any(size is None for size in sizes.values()):
        return None
    copied = copy.deepcopy(image_processor)
    for name, size in sizes.items():
        setattr(copied, name, size)
    return copied


def _scaled(size: Any, scale: float) -> Any:
    if isinstance(size, int | float):
        return math.ceil(size * scale)
    # A dict, or an object of Transformers that behaves like one, in which missing values are None.
    items = size if isinstance(size, Mapping) else getattr(size, "__dict__", {})
    given = {key: value for key, value in items.items() if value is not None}
    if not given or not given.keys() <= EDGES:
        return None
    scaled = {key: math.ceil(value * scale) for key, value in given.items()}
    return scaled if isinstance(size, dict) else type(size)(**scaled)
