"""Return freed memory to the system, so that one phase does not add to the memory of the next."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


LARGE_BLOCK = 4 * 2**20
"""Size in bytes from which glibc takes a block directly from the system while the heap is bounded."""

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` in glibc's `malloc.h`."""

_CPU = torch.device("cpu")
_bounded = ContextVar("bounded", default=False)


@contextmanager
def bounded_heap(wanted: bool) -> Iterator[None]:
    """Return freed memory to the system at once, at the price of time: for work under a memory limit.

    glibc keeps freed blocks below a threshold, which it raises by itself, up to 32 MiB, with the size of the blocks that
    it sees freed. Activations then fragment the heap: the same work takes now what its tensors need and now three times
    as much. This sets the threshold to `LARGE_BLOCK`, unless the environment sets one (`MALLOC_MMAP_THRESHOLD_`,
    `GLIBC_TUNABLES`), and makes `trim_heap` effective. The threshold stays for the rest of the process, since glibc
    cannot go back to its own rule. If `wanted` is false nothing changes.
    """
    token = _bounded.set(wanted)
    try:
        if wanted:
            _set_mmap_threshold()
        yield
    finally:
        _bounded.reset(token)


def trim_heap(device: torch.device = _CPU) -> None:
    """Return the pages of freed blocks to the system after work on a device, if inside `bounded_heap`.

    Work on a GPU leaves nothing behind in the CPU's heap.
    """
    if _bounded.get() and device.type == "cpu" and (trim := _function("malloc_trim", ctypes.c_size_t)) is not None:
        trim(0)


def _set_mmap_threshold() -> None:
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = _function("mallopt", ctypes.c_int, ctypes.c_int)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)


@functools.cache
def _function(name: str, *arguments: type) -> Callable[..., int] | None:
    """Return a function of the C library; None if it has none with this name."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    found = getattr(library, name, None)
    if found is not None:
        found.argtypes = list(arguments)
    return found
