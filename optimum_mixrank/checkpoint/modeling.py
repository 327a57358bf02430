"""The factored linear layers. Needs torch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..runtime.precision import to_float64
from .rank_map import FactoredLayer, encode_rows, stored_values


# PyTorch 2.6 does not tell export from compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class FactoredLinear(nn.Module, ABC):
    """A linear layer `y = W x + b` whose weight has a low rank and is stored as two factors.

    The factors are ordinary `nn.Linear` modules, `factor_a` and `factor_b`, so that quantizers and PEFT find what they
    know.

    `weight` is an empty parameter. It stands where a dense layer has its weight: a program that does not know this
    layer and expects a dense one stops with a size mismatch instead of going on with random weights.

    Args:
        in_features: Size of each input, `n`.
        out_features: Size of each output, `m`.
        rank: Inner dimension, in `[1, min(m, n)]`.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        layout: Name of the layout, as it stands in the rank map.

    Raises:
        ValueError: if the rank is outside `[1, min(in_features, out_features)]`.
    """

    layout: ClassVar[str]
    factor_a: nn.Linear
    factor_b: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank={rank} is outside [1, {min(in_features, out_features)}] for a layer of shape "
                f"[{out_features}, {in_features}]."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        # A parameter rather than a buffer: buffers of size zero break disk offload in Transformers 4.57.
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias, `[out_features]`, or None."""

    @abstractmethod
    def set_bias(self, bias: Tensor) -> None:
        """Give the layer another bias, `[out_features]`; it must have one already."""

    @abstractmethod
    def product(self) -> Tensor:
        """The weight `W`, `[out_features, in_features]`, multiplied in float64.

        Raises:
            ValueError: if an adapter or a quantizer has taken a factor's place.
        """

    def _check_factors(self) -> None:
        """Refuse to multiply what is no plain weight, or not all that a factor computes."""
        for name, factor in (("factor_a", self.factor_a), ("factor_b", self.factor_b)):
            weight = factor.weight
            if not isinstance(factor, nn.Linear) or type(weight) not in (nn.Parameter, Tensor):
                kinds = " with a ".join(f"{type(each).__module__}.{type(each).__name__}" for each in (factor, weight))
                raise ValueError(
                    f"{name} of a {type(self).__name__} is a {kinds}, so that the product of the factors is not known. "
                    "Merge adapters first (`merge_and_unload()`); make a model dense before it is quantized."
                )

    @property
    def num_values(self) -> int:
        """Stored values of the weight: of its factors, without bias and indices."""
        return stored_values(self.out_features, self.in_features, self.rank, self.layout)

    @property
    def entry(self) -> FactoredLayer:
        """What the rank map says of this layer."""
        return FactoredLayer(self.rank, self.bias is not None, self.layout)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same function, multiplied in float64 and rounded once.

        Raises:
            ValueError: as `product`.
        """
        product = self.product()
        weight, bias = self.factor_a.weight, self.bias
        dense = nn.Linear(
            self.in_features, self.out_features, bias=bias is not None, device="meta", dtype=weight.dtype
        )
        dense.weight = nn.Parameter(product.to(weight), requires_grad=weight.requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        # From numbers alone: the factors may have been replaced by quantized or adapted modules.
        kept = self.num_values / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"layout={self.layout}, kept={kept:.1%}"
        )


class LowRankLinear(FactoredLinear):
    """A linear layer whose weight is the product of two factors: `y = B (A x) + b`.

    `factor_a.weight` is `A`, `[rank, in_features]`; `factor_b.weight` is `B`, `[out_features, rank]`;
    `factor_b.bias` is `b`, `[out_features]`. `r (m + n)` values are stored, and one token costs as many multiply-adds.

    Args:
        in_features: Size of each input, `n`.
        out_features: Size of each output, `m`.
        rank: Inner dimension, in `[1, min(m, n)]`.
        bias: Whether the layer adds a bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the rank is outside `[1, min(in_features, out_features)]`.
    """

    layout = "factors"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self.factor_a = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.factor_b = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Build the layer from given factors, on their device and in their dtype.

        Args:
            A: `[rank, in_features]`.
            B: `[out_features, rank]`.
            bias: `[out_features]`.

        Raises:
            ValueError: if the shapes do not fit each other.
        """
        fits = A.ndim == B.ndim == 2 and len(A) == B.shape[1] and (bias is None or bias.shape == B.shape[:1])
        if not fits:
            raise ValueError(
                f"The factors do not fit: A is {list(A.shape)}, B is {list(B.shape)}, the bias is "
                f"{None if bias is None else list(bias.shape)}. Expected are [rank, in_features], [out_features, rank] "
                "and [out_features] or None."
            )
        layer = cls(A.shape[1], B.shape[0], A.shape[0], bias=bias is not None, device="meta", dtype=A.dtype)
        # Contiguous, so that the same kernels run before saving and after loading: bit-identical results.
        layer.factor_a.weight = nn.Parameter(A.detach().contiguous())
        layer.factor_b.weight = nn.Parameter(B.detach().contiguous())
        if bias is not None:
            layer.factor_b.bias = nn.Parameter(bias.detach().contiguous())
        layer.weight = nn.Parameter(A.new_empty(0), requires_grad=False)
        return layer

    @property
    def bias(self) -> Tensor | None:
        """The bias, `[out_features]`."""
        return self.factor_b.bias

    def set_bias(self, bias: Tensor) -> None:
        """Give the layer another bias, `[out_features]`; it must have one already."""
        self.factor_b.bias = _like(bias, self.factor_b.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        # Through the modules, never through their weights: they may be replaced by quantized or adapted ones.
        return self.factor_b(self.factor_a(input))

    def product(self) -> Tensor:
        """See `FactoredLinear.product`; here `B A`."""
        self._check_factors()
        return to_float64(self.factor_b.weight) @ to_float64(self.factor_a.weight)


class PivotedLinear(FactoredLinear):
    """A linear layer of rank r whose weight is stored in `r (m + n) - r²` values.

    `r` rows of the weight, the pivot rows, are stored as they are; the others are combinations of them. With
    `A = W[pivots]`, `[rank, in_features]`, and `C`, `[out_features - rank, rank]`: `u = A x + b[pivots]` holds the
    outputs of the pivot rows and `C u + c` those of the others, where `c = b[others] - C b[pivots]`. One token costs
    as many multiply-adds as there are values where the two products are computed as they stand and the outputs brought
    into order by a gather: exported, or with adapters. Otherwise the rows are brought into order, the identity's among
    them, and that takes less time for `rank²` multiply-adds more per token.

    `factor_a` is `A` with its bias, `factor_b` is `C` with its bias `c`; the two biases take `m` values, as the bias of
    the dense layer does. A layer of rank `out_features` has no other rows, so its rank must be smaller.

    Which rows are pivots is structure, not weight: it stands in the rank map, and not in the state dict.

    Args:
        in_features: Size of each input, `n`.
        out_features: Size of each output, `m`.
        rank: Number of pivot rows, in `[1, min(m - 1, n)]`.
        bias: Whether the layer adds a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        pivots: The pivot rows, ascending; default: the first `rank` rows.

    Attributes:
        pivots: As given.
        order: Where each output stands among pivots and others, int64, `[out_features]`; moved to the inputs' device
            when it is needed there.

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
                f"The pivots of a layer of shape [{out_features}, {in_features}] and rank {rank} are to be {rank} "
                f"different rows, ascending; given are {len(self.pivots)}, the last is {self.pivots[-1:]}."
            )
        rows = [*self.pivots, *(row for row in range(out_features) if row not in is_pivot)]
        # No buffer: Transformers 4.57 cannot offload a model with stored buffers to disk. On the host whatever the
        # device, since the weights may be on the meta device.
        self.order = torch.tensor(rows, device="cpu").argsort()

    @classmethod
    def from_pivots(cls, A: Tensor, C: Tensor, pivots: Tensor, bias: Tensor | None = None) -> PivotedLinear:
        """Build the layer from its pivot rows, on their device and in their dtype.

        Args:
            A: The pivot rows, `[rank, in_features]`.
            C: Coefficients of the other rows, in ascending order of rows, `[out_features - rank, rank]`.
            pivots: Rows in the order of `A`, ascending, int64, `[rank]`.
            bias: `[out_features]`.

        Raises:
            ValueError: if the shapes do not fit each other, or the pivots are not ascending.
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
        layer.factor_a.weight = nn.Parameter(A.detach().contiguous())
        layer.factor_b.weight = nn.Parameter(C.detach().contiguous())
        if bias is not None:
            layer.factor_a.bias = nn.Parameter(A.new_empty(rank))
            layer.factor_b.bias = nn.Parameter(A.new_empty(len(C)))
        layer.weight = nn.Parameter(A.new_empty(0), requires_grad=False)
        if bias is not None:
            layer.set_bias(bias)
        return layer

    @property
    def entry(self) -> FactoredLayer:
        """What the rank map says of this layer."""
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
        """Give the layer another bias, `[out_features]`; it must have one already."""
        # By position among pivots and others: `order` read backwards.
        ordered = bias.detach().to(self.order.device)[self.order.argsort()]
        self.factor_a.bias = _like(ordered[: self.rank], self.factor_a.bias)
        # From the pivot bias as it is stored, so that the others absorb its rounding.
        combined = to_float64(self.factor_b.weight) @ to_float64(self.factor_a.bias)
        self.factor_b.bias = _like(to_float64(ordered[self.rank :]) - combined, self.factor_b.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        order = self.order.to(input.device)
        if not order.is_meta:
            self.order = order
        pivots = self.factor_a(input)
        plain = _plain(self.factor_b)
        if plain is not None:
            return nn.functional.linear(pivots, *self._ordered_rows(plain, order))
        outputs = torch.cat([pivots, self.factor_b(pivots)], dim=-1)
        # `index_select(-1, …)` says the same and takes up to fifteen times as long on a CPU.
        return outputs.gather(-1, order.expand(outputs.shape))

    def _ordered_rows(self, factor: nn.Linear, order: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight, `[out_features, rank]`, and bias that give all outputs from those of the pivots, in their order.

        The identity costs `rank²` multiply-adds per token, but to bring a few weights into order takes less time than to
        bring all outputs into order.
        """
        C, c = factor.weight, factor.bias
        weight = torch.cat([torch.eye(self.rank, dtype=C.dtype, device=C.device), C]).index_select(0, order)
        return weight, None if c is None else torch.cat([c.new_zeros(self.rank), c]).index_select(0, order)

    def product(self) -> Tensor:
        """See `FactoredLinear.product`; here the pivot rows and, below them, `C A`, brought into order."""
        self._check_factors()
        A = to_float64(self.factor_a.weight)
        return torch.cat([A, to_float64(self.factor_b.weight) @ A]).index_select(0, self.order.to(A.device))


def _plain(factor: nn.Module) -> nn.Linear | None:
    """The linear layer whose weight and bias say what a factor computes, here and now; None if anything else does.

    Adapters, quantizers, hooks and offloading put something else in its place; an adapter that is switched off leaves all
    to the layer under it. Exporters see the factor's module, so that files hold the factors as they are stored.
    """
    if getattr(factor, "disable_adapters", False) and not (factor.merged or _is_listened_to(factor)):
        factor = factor.base_layer
    is_plain = (
        type(factor) is nn.Linear
        and type(factor.weight) is nn.Parameter
        and not _is_listened_to(factor)
        and "forward" not in vars(factor)
        and not (_is_exporting() or torch.jit.is_tracing())
    )
    return factor if is_plain else None


def _is_listened_to(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `model` has a submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _like(values: Tensor, parameter: Tensor) -> nn.Parameter:
    """A new parameter with these values; the old one may belong to another model too."""
    return nn.Parameter(values.detach().to(parameter), requires_grad=parameter.requires_grad)
