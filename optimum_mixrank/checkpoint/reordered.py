"""The second factor of a pivoted layer with its rows in the order of the outputs, kept between forward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reordered(NamedTuple):
    """The rows of `[I; C]`, `[out_features, rank]`, and of `[0; c]`, `[out_features]` or None, in the order of outputs."""

    rows: Tensor
    bias: Tensor | None


def reordered(C: Tensor, c: Tensor | None, order: Tensor) -> Reordered:
    """Return the matrix and the bias that lead from the outputs of the pivot rows to all outputs.

    Args:
        C: Coefficients of the other rows, `[out_features - rank, rank]`.
        c: Their bias, `[out_features - rank]`, or None.
        order: Position of each output among pivots and others, int64, `[out_features]`.
    """
    rank = C.shape[1]
    identity = torch.eye(rank, dtype=C.dtype, device=C.device)
    # Stored by columns: with an odd rank, rows would start at addresses that vector instructions are slow to load from.
    rows = torch.cat([identity, C.t()], dim=1).index_select(1, order).t()
    bias = None if c is None else torch.cat([c.new_zeros(rank), c]).index_select(0, order)
    return Reordered(rows, bias)


class ReorderedMemo:
    """Keeps what `reordered` returns for as long as the tensors that it was made from exist and stay as they are.

    It is never copied or pickled. A change through `.data`, which PyTorch does not count, goes unnoticed until `clear` is
    called.
    """

    _known: _Known | None = None

    def get(self, C: Tensor, c: Tensor | None, order: Tensor) -> Reordered:
        """Return what `reordered` does, as constants without gradients."""
        known = self._known
        if known is not None and known.is_of(C, c):
            return known.result
        # Ordinary tensors, which a later pass with gradients may use.
        with torch.inference_mode(False), torch.no_grad():
            result = reordered(C, c, order)
        counted = not (C.is_inference() or (c is not None and c.is_inference()))
        if counted and type(result.rows) is Tensor and not result.rows.is_meta:
            self._known = _Known(C, c, result, weakref.ref(self))
        return result

    def clear(self) -> None:
        """Forget what is kept."""
        self._known = None

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        known = self._known
        tensors = () if known is None else known.result
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReorderedMemo:
        return ReorderedMemo()

    def __reduce__(self) -> tuple[type[ReorderedMemo], tuple[()]]:
        return ReorderedMemo, ()


class _Known:
    """A result, and what it was made from.

    Args:
        C: As for `reordered`, referred to weakly: offloaded parameters are replaced after every pass, and the result has to
            go with them.
        c: The same.
        result: What `reordered` has returned.
        memo: Forgets the result when one of the parameters is gone.
    """

    def __init__(self, C: Tensor, c: Tensor | None, result: Reordered, memo: weakref.ref[ReorderedMemo]) -> None:
        forget = _forgetting(memo)
        self._C, self._c = weakref.ref(C, forget), None if c is None else weakref.ref(c, forget)
        self._state = _state(C, c)
        # Keep the addresses from being used again while they are compared.
        self._storages = (C.detach(), None if c is None else c.detach())
        self.result = result

    def is_of(self, C: Tensor, c: Tensor | None) -> bool:
        """Whether the result is that of these parameters as they are now."""
        known = None if self._c is None else self._c()
        return self._C() is C and known is c and self._state == _state(C, c)


def _state(C: Tensor, c: Tensor | None) -> tuple[int, ...]:
    """Return versions and addresses."""
    state = (C._version, C.data_ptr())
    return state if c is None else (*state, c._version, c.data_ptr())


def _forgetting(memo: weakref.ref[ReorderedMemo]) -> Callable[[Any], None]:
    # Not a method of the memo, which would then refer to itself and outlive its layer until the next garbage collection.
    def forget(_: Any) -> None:
        owner = memo()
        if owner is not None:
            owner.clear()

    return forget
