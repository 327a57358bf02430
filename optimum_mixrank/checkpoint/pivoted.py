"""The factored linear layer that stores rows of its weight and combines the others from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.precision import to_float64
from .memo import AffineMap, Memo
from .modeling import FactoredLinear, new_parameter
from .rank_map import FactoredLayer, encode_rows


# PyTorch 2.6 cannot tell export from compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class PivotedLinear(FactoredLinear):
    """A linear layer of rank r whose weight is stored in `r (m + n) - r²` values.

    `r` rows of the weight, the pivot rows, are stored as they are; the others are linear combinations of them. With
    `A = W[pivots]`, `[rank, in_features]`, and coefficients `C`, `[out_features - rank, rank]`, the outputs of the pivot
    rows are `u = A x + b[pivots]`, and those of the other rows are `C u + c`, where `c = b[others] - C b[pivots]`.

    `factor_a` is `A` with the bias `b[pivots]`, `factor_b` is `C` with the bias `c`; together the biases take `m` values,
    like the bias of the dense layer. Which rows are pivots is structure, not weight: it is stored in the rank map, and
    not in the state dict.

    Exported, or with adapters, the layer computes the two products and reorders their outputs by a gather; one token
    then costs as many multiply-adds as values are stored. Otherwise it reorders the rows of `[I; C]` instead, which takes
    less time and memory for activations in spite of `rank²` more multiply-adds per token. Without gradients of its
    parameters, the layer keeps this matrix of `out_features · rank` values from one pass to the next, until its parameters
    change or are trained, the layer is moved, or its mode is set by `train()` or `eval()`; see `Memo`.

    Args:
        in_features: Size of each input, `n`.
        out_features: Size of each output, `m`.
        rank: Number of pivot rows, in `[1, min(m - 1, n)]`.
        bias: Whether the layer adds a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        pivots: The pivot rows, ascending; default: the first `rank` rows.

    Attributes:
        order: Position of each output among the outputs of pivots and others, int64, `[out_features]`; it moves to the
            device of the inputs when it is needed there.

    Raises:
        ValueError: if the rank is outside `[1, min(m - 1, n)]`, or the pivots are not that many different rows.
    """

    layout = "pivoted"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pivots: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        if rank == out_features:
            raise ValueError(
                f"rank={rank} of a pivoted layer of shape [{out_features}, {in_features}] leaves no row to be "
                "combined; use a smaller rank or a dense layer."
            )
        self.factor_a = nn.Linear(in_features, rank, bias=bias, device=device, dtype=dtype)
        self.factor_b = nn.Linear(rank, out_features - rank, bias=bias, device=device, dtype=dtype)
        self.pivots = tuple(range(rank) if pivots is None else pivots)
        is_pivot = set(self.pivots)
        if sorted(is_pivot) != list(self.pivots) or len(is_pivot) != rank or not is_pivot <= set(range(out_features)):
            raise ValueError(
                f"The pivots of a layer of shape [{out_features}, {in_features}] and rank {rank} must be {rank} "
                f"different rows, ascending; {len(self.pivots)} are given, the last is {self.pivots[-1:]}."
            )
        rows = [*self.pivots, *(row for row in range(out_features) if row not in is_pivot)]
        # Not a buffer: Transformers 4.57 cannot offload a model with stored buffers to disk. On the host whatever the
        # device, since the weights may be on the meta device.
        self.order = torch.tensor(rows, device="cpu").argsort()
        self._memo = Memo()

    @classmethod
    def from_pivots(cls, A: Tensor, C: Tensor, pivots: Tensor, bias: Tensor | None = None) -> PivotedLinear:
        """Build the layer from its pivot rows, on their device and in their dtype.

        Args:
            A: The pivot rows, `[rank, in_features]`.
            C: Coefficients of the other rows, in ascending order of rows, `[out_features - rank, rank]`.
            pivots: Indices of the rows of `A`, ascending, int64, `[rank]`.
            bias: `[out_features]`, or None.

        Raises:
            ValueError: if the shapes do not fit together, or the pivots are not ascending.
        """
        rank, out_features = len(A), len(A) + len(C)
        fits = A.ndim == C.ndim == 2 and C.shape[1] == rank and pivots.shape == (rank,)
        if not fits or not (bias is None or bias.shape == (out_features,)):
            raise ValueError(
                f"The factors do not fit: A is {list(A.shape)}, C is {list(C.shape)}, the pivots are "
                f"{list(pivots.shape)}, the bias is {None if bias is None else list(bias.shape)}. Expected are [rank, "
                "in_features], [out_features - rank, rank], [rank] and [out_features] or None."
            )
        layer = cls(A.shape[1], out_features, rank, bias is not None, "meta", A.dtype, pivots.tolist())
        layer._set_factors(A, C)
        if bias is not None:
            layer.factor_a.bias = nn.Parameter(A.new_empty(rank))
            layer.factor_b.bias = nn.Parameter(A.new_empty(len(C)))
            layer.set_bias(bias)
        return layer

    @property
    def entry(self) -> FactoredLayer:
        """See `FactoredLinear.entry`."""
        return replace(super().entry, pivots=encode_rows(self.pivots))

    @property
    def bias(self) -> Tensor | None:
        """The bias `b`, `[out_features]`, computed from the biases of the two factors."""
        if self.factor_a.bias is None:
            return None
        pivot_bias = self.factor_a.bias
        rest = to_float64(self.factor_b.weight) @ to_float64(pivot_bias) + to_float64(self.factor_b.bias)
        bias = torch.cat([pivot_bias.detach(), rest.to(pivot_bias)]).index_select(0, self.order.to(pivot_bias.device))
        return bias.requires_grad_(pivot_bias.requires_grad)

    def set_bias(self, bias: Tensor) -> None:
        """See `FactoredLinear.set_bias`."""
        # `order` backwards leads from the order of outputs to pivots and others.
        ordered = bias.detach().to(self.order.device)[self.order.argsort()]
        self.factor_a.bias = new_parameter(ordered[: self.rank], self.factor_a.bias)
        # From the pivot bias as it is stored, so that the others absorb its rounding.
        combined = to_float64(self.factor_b.weight) @ to_float64(self.factor_a.bias)
        self.factor_b.bias = new_parameter(to_float64(ordered[self.rank :]) - combined, self.factor_b.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        pivots = self.factor_a(input)
        second = _plain_linear(self._modules["factor_b"])
        if second is not None:
            return nn.functional.linear(pivots, *self._rows(second, input.device))
        self._memo.clear()
        outputs = torch.cat([pivots, self.factor_b(pivots)], dim=-1)
        # `index_select(-1, …)` does the same and takes up to fifteen times as long on a CPU.
        return outputs.gather(-1, self._order_on(input.device).expand(outputs.shape))

    @property
    def kept_tensors(self) -> list[Tensor]:
        """What the layer keeps between forward passes beside its parameters."""
        return self._memo.tensors

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Merging an adapter changes weights without PyTorch's notice, and then puts the factor back in its place; averages
        # of weights are copied in the same way before the mode is set.
        if (memo := self.__dict__.get("_memo")) is not None:
            memo.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PivotedLinear:
        # Before, since PyTorch cannot exchange the contents of parameters that are referred to weakly.
        self._memo.clear()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # For the same reason.
        self._memo.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _order_on(self, device: torch.device) -> Tensor:
        """Return `order` on a device, where it stays unless that is the meta device."""
        order = self.order
        if order.device != device:
            order = order.to(device)
            if not order.is_meta:
                self.order = order
        return order

    def _rows(self, second: nn.Linear, device: torch.device) -> AffineMap:
        """Return the map from the outputs of the pivot rows to all outputs: the rows of `[I; C]` and `[0; c]` in order."""
        if torch.compiler.is_compiling():
            return self._reordered(second, device)
        parameters = [each for each in second._parameters.values() if each is not None]
        if torch.is_grad_enabled() and any(each.requires_grad for each in parameters):
            self._memo.clear()
            return self._reordered(second, device)
        return self._memo.get(parameters, lambda: self._reordered(second, device))

    def _reordered(self, second: nn.Linear, device: torch.device) -> AffineMap:
        C, c, order = second.weight, second.bias, self._order_on(device)
        identity = torch.eye(self.rank, dtype=C.dtype, device=C.device)
        # By columns: with an odd rank, rows would start at addresses that vector instructions are slow to load from.
        rows = torch.cat([identity, C.t()], dim=1).index_select(1, order).t()
        return AffineMap(rows, None if c is None else torch.cat([c.new_zeros(self.rank), c]).index_select(0, order))

    @torch.no_grad()
    def second_factor(self) -> Tensor:
        """See `FactoredLinear.second_factor`; here the rows of `[I; C]` in the order of the outputs."""
        self._check_factors()
        return self._reordered(self.factor_b, self.factor_b.weight.device).weight.contiguous()

    def product(self) -> Tensor:
        """See `FactoredLinear.product`; here the rows of `A` and `C A` in the order of the outputs."""
        self._check_factors()
        A = to_float64(self.factor_a.weight)
        return torch.cat([A, to_float64(self.factor_b.weight) @ A]).index_select(0, self.order.to(A.device))


def _plain_linear(factor: nn.Module) -> nn.Linear | None:
    """Return the linear layer whose weight and bias are all that a factor computes now, or None if there is more to it.

    Adapters, quantizers, hooks and offloading add to it; a disabled adapter leaves everything to the layer below it.
    Exporters have to call the factor itself, so that exported files hold the factors as they are stored.
    """
    if (
        type(factor) is not nn.Linear
        and getattr(factor, "disable_adapters", False)
        and not (factor.merged or _has_hooks(factor))
    ):
        factor = factor.base_layer
    is_plain = (
        type(factor) is nn.Linear
        and type(factor._parameters.get("weight")) is nn.Parameter
        and not _has_hooks(factor)
        and "forward" not in factor.__dict__
        and not (_is_exporting() or torch.jit.is_tracing())
    )
    return factor if is_plain else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
