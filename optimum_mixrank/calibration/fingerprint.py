"""Fingerprints of what statistics were taken from, so that they are not used for something else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


class ImageFingerprint:
    """SHA-256 over the digests of images in their order, however they are batched and wherever they were seen."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}

    def update(self, pixel_values: Tensor, batch: int = 0) -> None:
        """Take in images, `[batch, channels, height, width]`, behind those of the same or a lower batch number."""
        digests = b"".join(hashlib.sha256(_bytes(image)).digest() for image in pixel_values)
        self._digests[batch] = self._digests.get(batch, b"") + digests

    def digests(self, batch: int) -> bytes:
        """Of the images of a batch, 32 bytes each."""
        return self._digests.get(batch, b"")

    def state_dict(self) -> dict[str, Tensor]:
        """What was taken in, as tensors."""
        digests = b"".join(self._digests.values())
        return {
            "batches": torch.tensor(list(self._digests), dtype=torch.int64),
            "sizes": torch.tensor([len(each) for each in self._digests.values()], dtype=torch.int64),
            "digests": torch.from_numpy(np.frombuffer(digests, np.uint8).copy()),
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what `state_dict` gave, in the place of what is there."""
        parts = tensors["digests"].split(tensors["sizes"].tolist())
        batches = tensors["batches"].tolist()
        self._digests = {batch: part.numpy().tobytes() for batch, part in zip(batches, parts, strict=True)}

    def merge(self, other: ImageFingerprint) -> None:
        """Take in the images of other batches, which another process has seen."""
        self._digests.update(other._digests)

    def hexdigest(self) -> str:
        """The fingerprint of the images so far."""
        return hashlib.sha256(b"".join(self._digests[batch] for batch in sorted(self._digests))).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    # Any dtype, bfloat16 included, as bytes.
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
