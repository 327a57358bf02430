"""What a layer makes from its parameters and keeps between forward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class AffineMap(NamedTuple):
    """The matrix of a linear map, `[out_features, in_features]`, and its bias, `[out_features]` or None."""

    weight: Tensor
    bias: Tensor | None


class Memo:
    """Keeps a map for as long as the parameters that it was made from exist and stay as they are.

    It is never copied or pickled. A change through `.data`, which PyTorch does not count, goes unnoticed until `clear` is
    called. Nothing is kept of parameters whose changes are not counted at all: those that have a gradient, since fused
    optimizers do not count their steps; those in memory shared with other processes, which count their own changes only;
    and those made in inference mode.
    """

    _known: _Known | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], AffineMap]) -> AffineMap:
        """Return the map made from these parameters, as constants without gradients.

        Args:
            sources: The parameters that it is made from.
            make: Makes it.
        """
        known = self._known
        if known is not None and known.is_of(sources):
            return known.result
        self.clear()
        # Ordinary tensors, which a later pass with gradients may use.
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        # Other kinds of tensors are those of a trace.
        if _is_counted(sources) and type(result.weight) is Tensor and not result.weight.is_meta:
            self._known = _Known(sources, result, weakref.ref(self))
        return result

    def clear(self) -> None:
        """Forget what is kept."""
        self._known = None

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept."""
        kept = () if self._known is None else self._known.result
        return [tensor for tensor in kept if tensor is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


class _Known:
    """A map, and what it was made from.

    Args:
        sources: Referred to weakly: offloaded parameters are replaced after every pass, and the map has to go with them.
        result: The map.
        memo: Forgets the map when one of the parameters is gone.
    """

    def __init__(self, sources: Sequence[Tensor], result: AffineMap, memo: weakref.ref[Memo]) -> None:
        forget = _forgetting(memo)
        self._sources = [(weakref.ref(each, forget), each._version, each.data_ptr()) for each in sources]
        # Keep the addresses from being used again while they are compared.
        self._storages = [each.detach() for each in sources]
        self.result = result

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether the map is that of these parameters as they are now."""
        if len(sources) != len(self._sources):
            return False
        # In a loop, since this is done for every layer in every pass.
        for (known, version, address), each in zip(self._sources, sources, strict=True):
            if each.grad is not None or each._version != version or each.data_ptr() != address or known() is not each:
                return False
        return True


def _is_counted(sources: Sequence[Tensor]) -> bool:
    """Return whether PyTorch counts all changes of these parameters."""
    # On a GPU all memory can be shared.
    return not any(
        each.is_inference() or each.grad is not None or (each.device.type == "cpu" and each.is_shared())
        for each in sources
    )


def _forgetting(memo: weakref.ref[Memo]) -> Callable[[Any], None]:
    # Not a method of the memo, which would then refer to itself and outlive its layer until the next garbage collection.
    def forget(_: Any) -> None:
        owner = memo()
        if owner is not None:
            owner.clear()

    return forget
