"""Digests, by which damaged and mixed-up files are recognized.

They do not protect from somebody who changes a file on purpose, since anybody can compute them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor of any dtype, in row-major order."""
    # NumPy has no bfloat16; bytes exist for every dtype.
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def digest_content(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return the SHA-256 digest of texts and of names, dtypes, shapes and values of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{len(name)} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
