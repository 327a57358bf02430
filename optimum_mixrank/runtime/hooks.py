"""Hooks on modules that are always removed in the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


if TYPE_CHECKING:
    from typing_extensions import Self

Key = TypeVar("Key")


@contextmanager
def hooks_removed_on_exit(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks on exit, also after an exception."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwards_restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules the `forward` that each had, on exit; Accelerate and other libraries override it on a module.

    Models of Transformers 4.57 replace it on their modules while they run, to record outputs, and do not restore it if
    their forward pass is left early. Copies of such a model would go on calling the modules of the model itself.
    """
    before = {module: vars(module).get("forward") for module in modules}
    try:
        yield
    finally:
        for module, forward in before.items():
            if vars(module).get("forward") is not forward:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def group_by_tensor(calls: Iterable[tuple[Key, Tensor]]) -> list[list[Key]]:
    """Return the keys of calls, in their order; those called one after another with the very same tensor form a group."""
    groups: list[list[Key]] = []
    last: Tensor | None = None
    for key, tensor in calls:
        if tensor is last:
            groups[-1].append(key)
        else:
            groups.append([key])
        last = tensor
    return groups


class OutputListener(ABC):
    """Context manager that observes inputs and outputs of layers, given by module name; it leaves no hook behind."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Any]:
        """Return the forward hook for a layer."""

    @abstractmethod
    def _forget(self) -> None:
        """Release the tensors of the last batch."""

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
