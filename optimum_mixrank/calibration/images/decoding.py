"""Decode whatever holds an image into an RGB image, or report that it is broken."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class BrokenImageError(ValueError):
    """An image cannot be decoded; `name` is its file or row, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: object) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} cannot be decoded: {self.reason}"


def decode_image(item: Any, name: str = "image") -> Image.Image:
    """Decode one image completely and convert it to RGB.

    Args:
        item: A PIL image, a path, encoded bytes, a mapping with `bytes` or `path` (as `datasets` stores images), or an
            array of bytes, `[height, width]` or `[height, width, 1, 3 or 4]`. None, as a dataset holds for a missing
            image, is a broken image.
        name: Name of the image in errors, if its file is unknown.

    Returns:
        An RGB image, rotated according to its EXIF data. Grey, palette, CMYK and 16-bit images are converted;
        transparency is dropped, as in image pipelines.

    Raises:
        BrokenImageError: if the image is missing, damaged, truncated, empty, not an image or implausibly large.
        TypeError: if the item cannot hold an image.
    """
    if item is not None and not holds_image(item):
        raise TypeError(
            f"{name} is a {type(item).__name__}, which cannot hold an image; give PIL images, paths, encoded bytes, uint8 "
            "arrays [height, width, channels], or batches of `pixel_values`."
        )
    try:
        image = _open(item)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, … for damaged files.
        raise BrokenImageError(image_name(item) or name, error) from error


def holds_image(item: Any) -> bool:
    """Return whether an item is a single image in a form that `decode_image` accepts."""
    if isinstance(item, Mapping):
        return bool(item) and set(item) <= {"bytes", "path"}
    if isinstance(item, np.ndarray):
        has_channels = item.ndim == 3 and item.shape[2] in (1, 3, 4)
        return item.dtype == np.uint8 and (item.ndim == 2 or has_channels)
    return isinstance(item, Image.Image | bytes | bytearray | str | os.PathLike)


def image_name(item: Any) -> str | None:
    """Return the file that an item comes from, if it is known."""
    if isinstance(item, Mapping):
        return item.get("path") or None
    if isinstance(item, str | os.PathLike):
        return str(item)
    return getattr(item, "filename", None) or None


def _open(item: Any) -> Image.Image:
    if isinstance(item, Mapping):
        # If there are bytes, `path` is only the name that the file once had.
        item = item["bytes"] if item.get("bytes") is not None else item.get("path")
    if item is None:
        raise ValueError("the dataset holds no image here")
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        return Image.fromarray(item.squeeze(2) if item.ndim == 3 and item.shape[2] == 1 else item)
    # Read completely, so that no file stays open.
    encoded = item if isinstance(item, bytes | bytearray) else Path(item).expanduser().read_bytes()
    if not encoded:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(encoded))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the file to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would clip to 255 instead of scaling. Older releases open 16-bit PNG files in mode "I".
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("the pixels need more than 16 bits; convert the file to 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    return image.convert("RGB")
