"""Memory that has been freed goes back to the system, so that one phase does not bear what another has left."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch


_HOST = torch.device("cpu")

LARGE_BLOCK = 4 * 2**20
"""Bytes."""

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's `malloc.h`."""


def return_freed_memory(device: torch.device = _HOST) -> None:
    """Let the C library return the pages of freed blocks, of which glibc keeps what lies between blocks in use.

    Where the C library knows no such thing, nothing happens.

    Args:
        device: On which the work was done; what a GPU computes leaves nothing on the host.
    """
    trim = _function("malloc_trim", ctypes.c_size_t)
    if trim is not None and device.type == "cpu":
        trim(0)


@functools.cache
def keep_large_blocks_apart() -> None:
    """Let the C library take every large block from the system and return it as soon as it is freed.

    By itself glibc raises the size from which it does so with what it sees freed, up to 32 MiB, and smaller activations
    then leave holes in its heap: the same work takes once what its tensors need and once three times as much. This holds
    for the rest of the process, and has its price: the system clears every page again, so that passes over large batches
    take longer. Nothing happens where the environment sets the threshold, by `MALLOC_MMAP_THRESHOLD_` or in
    `GLIBC_TUNABLES`, since whoever sets it has decided, or where the C library knows no such thing.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = _function("mallopt", ctypes.c_int, ctypes.c_int)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)


@functools.cache
def _function(name: str, *arguments: type) -> Callable[..., int] | None:
    """Of the C library, if it has one of this name."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    found = getattr(library, name, None)
    if found is not None:
        found.argtypes = list(arguments)
    return found
