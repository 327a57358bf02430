"""How much memory a piece of work takes at most, on the host and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch


class PeakMemory:
    """By how much memory has grown at most since this object was made.

    On the host it is the resident memory that the Linux kernel counts for the process; its record of the highest value
    is reset first, and freed memory is returned to the system, so that what takes its place counts. On other systems it
    is unknown.

    Args:
        device: A GPU to watch as well.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        # Only glibc has `malloc_trim`.
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._resident_before = _kernel_bytes("VmRSS")
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated_before = torch.cuda.memory_allocated(self._device)

    @property
    def resident(self) -> int | None:
        """Peak of the resident memory of the process in bytes, including what it had before; None if unknown."""
        return _kernel_bytes("VmHWM")

    @property
    def host(self) -> int | None:
        """Peak growth on the host in bytes; None if unknown."""
        peak = self.resident
        return None if peak is None or self._resident_before is None else max(0, peak - self._resident_before)

    @property
    def device(self) -> int | None:
        """Peak growth of tensors on the GPU in bytes; None without one."""
        if self._device is None:
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._allocated_before


def _kernel_bytes(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
