"""Fingerprints of models and images, so that statistics are not used for others."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from ..runtime.digest import tensor_bytes
from ..runtime.inputs import ModelInputs


def fingerprint_model(model: nn.Module) -> str:
    """Return the SHA-256 digest of names, shapes, dtypes and values of all parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class ImageFingerprint:
    """SHA-256 digest of images in their order, regardless of how they are batched and distributed over processes."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}

    def update(self, inputs: ModelInputs | Tensor, batch: int = 0) -> None:
        """Add images after those of the same or a lower batch number."""
        found = ModelInputs.of(inputs)
        digests = b"".join(_digest(found[index : index + 1]) for index in range(len(found)))
        self._digests[batch] = self._digests.get(batch, b"") + digests

    def merge(self, other: ImageFingerprint) -> None:
        """Add the images of other batches, seen by another process."""
        self._digests.update(other._digests)

    def hexdigest(self) -> str:
        """Return the fingerprint of the images so far."""
        return hashlib.sha256(b"".join(self._digests[batch] for batch in sorted(self._digests))).hexdigest()


def _digest(image: ModelInputs) -> bytes:
    digest = hashlib.sha256(tensor_bytes(image.main[0] if len(image.main) == 1 else image.main))
    for name in sorted(set(image) - {image.main_name}):
        digest.update(name.encode() + tensor_bytes(image[name]))
    return digest.digest()
