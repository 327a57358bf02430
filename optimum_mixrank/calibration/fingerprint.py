"""Fingerprints of what statistics were taken from, so that they are not used for something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn


class PixelBatch(Protocol):
    """A batch of images."""

    @property
    def pixel_values(self) -> Tensor:
        """`[batch, channels, height, width]`."""


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


class ImageFingerprint:
    """SHA-256 over images in their order, however they are batched."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, pixel_values: Tensor) -> None:
        """Take in images, `[batch, channels, height, width]`."""
        for image in pixel_values:
            self._digest.update(_bytes(image))

    def hexdigest(self) -> str:
        """The fingerprint of the images so far."""
        return self._digest.hexdigest()

    def watch(self, batches: Iterable[PixelBatch]) -> Iterator[PixelBatch]:
        """Pass batches on and take them in."""
        for batch in batches:
            self.update(batch.pixel_values)
            yield batch


def _bytes(tensor: Tensor) -> memoryview:
    # Any dtype, bfloat16 included, as bytes.
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
