"""Decode whatever holds an image into an RGB image, or report that it is broken."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...runtime.formatting import type_of
from .files import open_file


FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "JXL", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "ICO")
"""Raster formats that are read, where Pillow or a registered plugin can. To show a PostScript file, Pillow would run it."""

_PILLOW_LIMIT = threading.Lock()
"""Held while `Image.MAX_IMAGE_PIXELS` has another value."""


class BrokenImageError(ValueError):
    """An image cannot be decoded; `name` is its file or row, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: object) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} cannot be decoded: {self.reason}"


def decode_image(item: Any, name: str = "image", max_image_pixels: int | None = None) -> Image.Image:
    """Decode one image completely and convert it to RGB.

    Args:
        item: A PIL image, a path (local, or one that `datasets` opens, such as `zip://a.png::b.zip`), encoded bytes, a
            mapping with `bytes` or `path` (as `datasets` stores images), or an array of bytes, `[height, width]` or
            `[height, width, 1, 3 or 4]`. None, as a dataset holds for a missing image, is a broken image.
        name: Name of the image in errors, if its file is unknown.
        max_image_pixels: Most pixels that an encoded image may have; default: `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        An RGB image, rotated according to its EXIF data. Grey, palette, CMYK and 16-bit images are converted;
        transparency is dropped, as in image pipelines.

    Raises:
        BrokenImageError: if the image is missing, damaged, truncated, empty, too large, in none of `FORMATS`, or not a
            regular file.
        TypeError: if the item cannot hold an image.
    """
    if item is not None and not holds_image(item):
        raise TypeError(
            f"{name} is {type_of(item)}, which cannot hold an image; give PIL images, paths, encoded bytes, uint8 "
            "arrays [height, width, channels], or batches of `pixel_values`."
        )
    try:
        return _load(item, max_image_pixels)
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


def encoded_image(item: Any) -> Any:
    """Return what holds the image in an item: the bytes or the path in a mapping, else the item itself."""
    if not isinstance(item, Mapping):
        return item
    # If there are bytes, `path` is only the name that the file once had.
    return item["bytes"] if item.get("bytes") is not None else item.get("path")


def _load(item: Any, max_image_pixels: int | None) -> Image.Image:
    """Return the upright RGB image, with all its pixels, so that no file stays open."""
    item = encoded_image(item)
    if item is None:
        raise ValueError("the dataset holds no image here")
    if isinstance(item, np.ndarray):
        return _to_rgb(Image.fromarray(item.squeeze(2) if item.ndim == 3 and item.shape[2] == 1 else item))
    if isinstance(item, Image.Image):
        if item.format == "EPS" and getattr(item, "tile", None):
            raise ValueError("it is a PostScript file, which Pillow would run to show it; convert it to PNG")
        item.load()
        return _to_rgb(item)
    if isinstance(item, bytes | bytearray):
        if not item:
            raise ValueError("the file is empty")
        return _decode(io.BytesIO(item), max_image_pixels)
    with open_file(item, Image.MAX_IMAGE_PIXELS if max_image_pixels is None else max_image_pixels) as file:
        return _decode(file, max_image_pixels)


def _decode(file: Any, max_image_pixels: int | None) -> Image.Image:
    Image.init()
    with _pillow_limit(max_image_pixels) as limit:
        try:
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
            # Pillow itself only warns below twice its limit.
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} × {image.height}")
            image.load()
            # Here, since the orientation may be read from the file once more.
            return _to_rgb(image)
        except UnidentifiedImageError as error:
            raise ValueError(
                f"cannot identify image: it is damaged, or not in a supported format ({', '.join(FORMATS)})"
            ) from error
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"it has more than max_image_pixels={limit} pixels ({error}), as a decompression bomb has; raise "
                "max_image_pixels if it is meant to be that large"
            ) from error


@contextmanager
def _pillow_limit(max_image_pixels: int | None) -> Iterator[int | None]:
    """Replace Pillow's limit on the size of images, a variable of the whole process, if another one is given."""
    usual = Image.MAX_IMAGE_PIXELS
    if max_image_pixels in (None, usual):
        yield usual
        return
    with _PILLOW_LIMIT:
        usual = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_image_pixels
        try:
            yield max_image_pixels
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the file to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would clip to 255 instead of scaling. Older releases open 16-bit PNG files in mode "I".
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("the pixels need more than 16 bits; convert the file to 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    return image.convert("RGB")
