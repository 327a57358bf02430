"""Memory that a forward pass takes beside the weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..inference import evaluation_mode


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
        if any(tensor.is_cuda for tensor in tensors):
            # A first pass makes what stays, such as the workspace of cuBLAS.
            model(**inputs)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(**inputs)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with _LiveTensors([*tensors, *model.parameters(), *model.buffers()]) as live:
            model(**inputs)
    return live.peak


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
