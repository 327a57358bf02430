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
        sources = (C,) if c is None else (C, c)
        known = self._known
        if known is not None and known.is_of(sources):
            return known.result
        # Ordinary tensors, which a later pass with gradients may use.
        with torch.inference_mode(False), torch.no_grad():
            result = reordered(C, c, order)
        if type(result.rows) is Tensor and not (result.rows.is_meta or any(each.is_inference() for each in sources)):
            self._known = _Known.of(sources, result, weakref.ref(self))
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


class _Known(NamedTuple):
    """A result, and references to what it was made from.

    Attributes:
        sources: The parameters, weakly: offloaded ones are replaced after every pass, and the result has to go with them.
        states: Version and address of each.
        storages: Views that keep these addresses from being used again while they are compared.
        result: The result.
    """

    sources: tuple[weakref.ref[Tensor], ...]
    states: tuple[tuple[int, int], ...]
    storages: tuple[Tensor, ...]
    result: Reordered

    @classmethod
    def of(cls, sources: tuple[Tensor, ...], result: Reordered, memo: weakref.ref[ReorderedMemo]) -> _Known:
        forget = _forgetting(memo)
        references = tuple(weakref.ref(each, forget) for each in sources)
        return cls(references, _states(sources), tuple(each.detach() for each in sources), result)

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        if len(sources) != len(self.sources) or self.states != _states(sources):
            return False
        return all(known() is each for known, each in zip(self.sources, sources, strict=True))


def _states(sources: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((-1 if each.is_inference() else each._version, each.data_ptr()) for each in sources)


def _forgetting(memo: weakref.ref[ReorderedMemo]) -> Callable[[Any], None]:
    # Not a method of the memo, which would then refer to itself and outlive its layer until the next garbage collection.
    def forget(_: Any) -> None:
        owner = memo()
        if owner is not None:
            owner.clear()

    return forget
