"""Open the file of an image, wherever it is, without reading more than an image may have."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from datasets import DownloadConfig
from datasets.utils.file_utils import xopen
from PIL import Image


_BYTES_PER_PIXEL = 8
"""Size of a pixel in the largest plain format, four channels of 16 bits."""

_HEADER_BYTES = 1 << 26
"""Room for what a file holds besides pixels: previews, colour profiles, comments."""


def open_file(
    path: str | os.PathLike[str],
    max_image_pixels: int | None = Image.MAX_IMAGE_PIXELS,
    token: str | bool | None = None,
) -> BinaryIO:
    """Open a file for reading; the caller closes it.

    Args:
        path: A local path, or one that `datasets` opens: a URL, or a chain such as `zip://a.png::b.zip`.
        max_image_pixels: Most pixels that the image may have, from which follows how large the file may be; None for
            any size.
        token: For files of a private repository on the Hub.

    Raises:
        OSError: if the file cannot be opened or read.
        ValueError: if it is empty, too large, or not a regular file, such as a pipe or a device without an end.
    """
    limit = None if max_image_pixels is None else _BYTES_PER_PIXEL * max_image_pixels + _HEADER_BYTES
    if is_remote(path):
        # Read here, since not every file system can go back in a file.
        with xopen(str(path), "rb", download_config=DownloadConfig(token=token)) as file:
            content = file.read() if limit is None else file.read(limit + 1)
        _check_size(len(content), limit)
        return io.BytesIO(content)
    local = Path(path).expanduser()
    # Before it is opened, since opening a pipe waits for somebody to write.
    status = local.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    _check_size(status.st_size, limit)
    return local.open("rb")


def is_remote(path: Any) -> bool:
    """Return whether a path is one that only `datasets` can open."""
    return isinstance(path, str) and "://" in path and not os.path.exists(path)


def _check_size(size: int, limit: int | None) -> None:
    if size == 0:
        raise ValueError("the file is empty")
    if limit is not None and size > limit:
        raise ValueError(
            f"the file has more than {limit:,} bytes, too many for an image of max_image_pixels; raise "
            "max_image_pixels if it is meant to be that large"
        )
