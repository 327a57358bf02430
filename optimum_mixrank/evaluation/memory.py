"""Memory of the weights, and of a forward pass beside them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checkpoint.pivoted import PivotedLinear
from ..runtime.forward import evaluation_mode


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers in memory; shared tensors count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def kept_bytes(model: nn.Module) -> int:
    """Return the bytes that pivoted layers keep beside their weights after a forward pass without gradients.

    Each keeps its second factor in the order of its outputs; see `PivotedLinear`.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _kept(model))


def _kept(model: nn.Module) -> list[Tensor]:
    return [tensor for each in model.modules() if isinstance(each, PivotedLinear) for tensor in each.kept_tensors]


def activation_bytes(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Return the peak memory of a forward pass in bytes, beside the weights and `inputs`, the model's arguments.

    On CUDA this is what the allocator hands out, including workspaces of kernels. Elsewhere it is the bytes of all
    tensors alive at the same time, without what kernels allocate and free internally. The model runs without gradients
    and is left as it was. What its first pass makes and keeps does not count; see `kept_bytes`.
    """
    tensors = [tensor for tensor in tree_leaves(dict(inputs)) if isinstance(tensor, Tensor)]
    with evaluation_mode(model):
        model(**inputs)
        return live_bytes(model, lambda: model(**inputs), tensors)


def live_bytes(model: nn.Module, work: Callable[[], Any], known: list[Tensor] | None = None) -> int:
    """Return the peak memory of some work with a model in bytes; see `activation_bytes`.

    The model's weights and the `known` tensors are not counted. Whether there are gradients is up to the caller.
    """
    existing = [*(known or []), *model.parameters(), *model.buffers(), *_kept(model)]
    if any(tensor.is_cuda for tensor in existing):
        # The first run allocates what stays, such as the workspace of cuBLAS.
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _LiveTensors(existing) as live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the memory of the tensors that operations return, for as long as they live."""

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
        key = storage._cdata  # the same for all views
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            self._now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, forget)
        self._now += size
