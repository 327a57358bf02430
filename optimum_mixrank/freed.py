"""Memory that has been freed goes back to the system, so that one phase does not bear what another has left."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Let the C library return the pages of freed blocks, of which glibc keeps what lies between blocks in use.

    Where the C library knows no such thing, nothing happens.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    trim = getattr(library, "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim
