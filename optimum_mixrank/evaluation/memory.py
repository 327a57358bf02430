"""Memory that a forward pass takes beside the weights, and the peak of a piece of work."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..runtime.forward import evaluation_mode
from ..runtime.malloc import trim_heap


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory; one that is used in several places counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def activation_bytes(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Most bytes that a forward pass holds at once beside weights and inputs.

    On CUDA this is what the allocator hands out, workspaces of kernels included. Elsewhere it is the bytes of all
    tensors that are alive at once, which leaves out what kernels take and give back within themselves. The model runs
    once, without gradients, and is left as it was.

    Args:
        model: Any model.
        inputs: Its keyword arguments, tensors on its device.
    """
    tensors = [tensor for tensor in tree_leaves(dict(inputs)) if isinstance(tensor, Tensor)]
    with evaluation_mode(model):
        return live_bytes(model, lambda: model(**inputs), tensors)


def live_bytes(model: nn.Module, work: Callable[[], Any], known: list[Tensor] | None = None) -> int:
    """Most bytes that some work with a model holds at once beside its weights; see `activation_bytes`.

    Args:
        model: The model.
        work: What to do, with the gradient mode as it is.
        known: Tensors that are there beforehand and are not counted.
    """
    weights = [*model.parameters(), *model.buffers()]
    if any(tensor.is_cuda for tensor in (*weights, *(known or []))):
        # A first pass makes what stays, such as the workspace of cuBLAS.
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _LiveTensors([*(known or []), *weights]) as live:
        work()
    return live.peak


class PeakMemory:
    """By how much memory has grown at most since this was made.

    On the host it is the resident memory that the Linux kernel counts for the process, whose mark of the highest value
    is set back. Elsewhere than on Linux it is not known. Memory that is free already goes back to the system first, for
    what takes its place counts.

    Args:
        device: A GPU to watch too.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        trim_heap()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._host = _kernel_bytes("VmRSS")
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated = torch.cuda.memory_allocated(self._device)

    @property
    def resident(self) -> int | None:
        """Most bytes of the process on the host, what was there before included; None if not known."""
        return _kernel_bytes("VmHWM")

    @property
    def host(self) -> int | None:
        """Bytes on the host; None if not known."""
        peak = self.resident
        return None if peak is None or self._host is None else max(0, peak - self._host)

    @property
    def device(self) -> int | None:
        """Bytes of tensors on the GPU; None without one."""
        if self._device is None:
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._allocated


def _kernel_bytes(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


class _LiveTensors(TorchDispatchMode):
    """Adds up the memory of tensors that operations return, until it is given back."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        # Weak references keep nothing alive; the dictionary keeps the references.
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._watch(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # views share it
        if key in self._seen:
            return

        def given_back(_: Any) -> None:
            self._now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, given_back)
        self._now += size
