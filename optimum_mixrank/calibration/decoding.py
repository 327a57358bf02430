"""Turn whatever holds an image into an RGB picture, or say that it is broken."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class BrokenImageError(ValueError):
    """An image cannot be decoded; the message names it."""


def decode_image(item: Any, name: str = "image") -> Image.Image:
    """Decode one image completely and convert it to RGB.

    Args:
        item: A PIL image, a path, encoded bytes, a mapping with `bytes` or `path` (as `datasets` stores images), or an
            array of bytes, `[height, width]` or `[height, width, 3 or 4]`.
        name: What to call the image in errors; its path is used where it has one.

    Returns:
        An RGB image, with the orientation of its EXIF data applied. Grey, palette, CMYK and 16-bit images are converted;
        transparency is dropped, as image pipelines do.

    Raises:
        BrokenImageError: if the image is damaged, truncated, empty, not an image or implausibly large.
        TypeError: if the item is nothing that could hold an image.
    """
    name = image_name(item) or name
    try:
        image = _open(item)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except TypeError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, … for damaged files.
        raise BrokenImageError(f"{name} cannot be decoded: {error}") from error


def image_name(item: Any) -> str | None:
    """The file that an item comes from, if it says so."""
    if isinstance(item, Mapping):
        return item.get("path")
    if isinstance(item, str | os.PathLike):
        return str(item)
    return getattr(item, "filename", None) or None


def holds_image(item: Any) -> bool:
    """Whether an item is a single image in a form that `decode_image` knows."""
    if isinstance(item, Mapping):
        return "pixel_values" not in item and ("bytes" in item or "path" in item)
    is_array = isinstance(item, np.ndarray) and item.dtype == np.uint8
    return is_array or isinstance(item, Image.Image | bytes | bytearray | str | os.PathLike)


def _open(item: Any) -> Image.Image:
    if isinstance(item, Mapping) and ("bytes" in item or "path" in item):
        item = item.get("bytes") if item.get("bytes") is not None else item.get("path")
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, bytes | bytearray):
        return Image.open(io.BytesIO(item))
    if isinstance(item, str | os.PathLike):
        return Image.open(Path(item).expanduser())
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        return Image.fromarray(item)
    raise TypeError(
        f"A {type(item).__name__} holds no image; give PIL images, paths, encoded bytes or uint8 arrays, or batches of "
        "`pixel_values`."
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips instead of scaling when it converts more than 8 bits.
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
