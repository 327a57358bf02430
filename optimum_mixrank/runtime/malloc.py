"""Memory that has been freed goes back to the system, so that one phase does not bear what another has left."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


_HOST = torch.device("cpu")

LARGE_BLOCK = 4 * 2**20
"""Bytes."""

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's `malloc.h`."""


_bounded = ContextVar("bounded", default=False)


@contextmanager
def bounded_heap(wanted: bool) -> Iterator[None]:
    """Let memory that is freed go back to the system at once, at the price of time: for work under a limit of memory.

    By itself glibc keeps small blocks for itself, and raises the size of what it calls small with what it sees freed, up
    to 32 MiB: activations then leave holes in its heap, and the same work takes once what its tensors need and once three
    times as much. Inside of this, `trim_heap` works; the threshold stays for the rest of the process, since glibc knows
    no way back. It is not touched where the environment sets it, by `MALLOC_MMAP_THRESHOLD_` or in `GLIBC_TUNABLES`.

    Args:
        wanted: False changes nothing.
    """
    token = _bounded.set(wanted)
    try:
        if wanted:
            _set_mmap_threshold()
        yield
    finally:
        _bounded.reset(token)


def trim_heap(device: torch.device = _HOST) -> None:
    """Let the C library return the pages of freed blocks, inside of `bounded_heap`; elsewhere nothing happens.

    Args:
        device: On which the work was done; what a GPU computes leaves nothing on the host.
    """
    if _bounded.get() and device.type == "cpu" and (trim := _function("malloc_trim", ctypes.c_size_t)) is not None:
        trim(0)


def _set_mmap_threshold() -> None:
    """Let the C library take every large block from the system, and return it as soon as it is freed."""
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
