"""The factored linear layers: their base class, and the layer that stores two plain factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.precision import to_float64
from .rank_map import FactoredLayer, stored_values


class Guard(nn.Parameter):
    """A parameter that is never trained, whatever the user calls.

    `model.requires_grad_(True)` reaches every parameter, and DistributedDataParallel waits for the gradient of each that is
    trainable; one that takes no part in the forward pass never gets one.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Guard:
        """Make one, also of what is one already: Accelerate does that where models are built without memory."""
        return super().__new__(cls, data.data if isinstance(data, Guard) else data, False)

    @property
    def requires_grad(self) -> bool:
        """False; setting it has no effect."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> Guard:
        """Do nothing."""
        return self


class Guarded(nn.Module):
    """A module in place of a dense one whose values are stored elsewhere.

    `weight` is an empty parameter where the dense module keeps its weight: a program that does not know this class and
    expects a dense module stops with a size mismatch instead of continuing with random weights. It is never trainable.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        # A parameter rather than a buffer: buffers of size zero break disk offload in Transformers 4.57.
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; `weight` as one that is never trainable. Assigning an attribute calls this as well."""
        super().register_parameter(name, _guarding(param) if name == "weight" else param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Guarded:
        super()._apply(fn, recurse)
        # Moved to another kind of device, a parameter is replaced by an ordinary one.
        self._parameters["weight"] = _guarding(self._parameters["weight"])
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Pickled, a parameter becomes an ordinary one.
        self._parameters["weight"] = _guarding(self._parameters["weight"])


class GuardedLinear(Guarded):
    """A module in place of a linear layer `[out_features, in_features]` whose values are stored elsewhere."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device, dtype)
        self.in_features = in_features
        self.out_features = out_features


class FactoredLinear(GuardedLinear, ABC):
    """A linear layer `y = W x + b` whose weight has low rank and is stored as two factors.

    The factors are ordinary `nn.Linear` modules, `factor_a` and `factor_b`, which quantizers and PEFT recognize. For the
    empty `weight` see `Guarded`.

    Attributes:
        layout: Name of the layout in the rank map.
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
        super().__init__(in_features, out_features, device, dtype)
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank={rank} is outside [1, {min(in_features, out_features)}] for a layer of shape "
                f"[{out_features}, {in_features}]."
            )
        self.rank = rank

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias, `[out_features]`, or None."""

    @abstractmethod
    def set_bias(self, bias: Tensor) -> None:
        """Replace the bias, `[out_features]`; the layer must have one already."""

    @abstractmethod
    def product(self) -> Tensor:
        """Return the weight `W`, `[out_features, in_features]`, multiplied in float64.

        Raises:
            ValueError: if an adapter or a quantizer has replaced a factor.
        """

    @abstractmethod
    def second_factor(self) -> Tensor:
        """Return the matrix `B` with which `W = B A`, `[out_features, rank]`, where `A` is the weight of `factor_a`.

        Raises:
            ValueError: as `product`.
        """

    @property
    def num_values(self) -> int:
        """Number of values stored for the weight, without bias and pivots."""
        return stored_values(self.out_features, self.in_features, self.rank, self.layout)

    @property
    def entry(self) -> FactoredLayer:
        """The entry of this layer in the rank map."""
        return FactoredLayer(self.rank, self.bias is not None, self.layout)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer that computes the same function, multiplied in float64 and rounded once.

        Raises:
            ValueError: as `product`.
        """
        product = self.product()
        weight, bias = self.factor_a.weight, self.bias
        dense = nn.Linear(self.in_features, self.out_features, bias is not None, "meta", weight.dtype)
        dense.weight = nn.Parameter(product.to(weight), requires_grad=weight.requires_grad)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        # From numbers alone: the factors may have been replaced by quantized or adapted modules.
        kept = self.num_values / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"layout={self.layout}, kept={kept:.1%}"
        )

    def _set_factors(self, A: Tensor, B: Tensor) -> None:
        # Contiguous, so that the same kernels run before saving and after loading: bit-identical results.
        self.factor_a.weight = nn.Parameter(A.detach().contiguous())
        self.factor_b.weight = nn.Parameter(B.detach().contiguous())
        self.weight = nn.Parameter(A.new_empty(0), requires_grad=False)

    def _check_factors(self) -> None:
        """Refuse to multiply factors whose weights are not plain tensors, or not all that the factors compute."""
        for name, factor in (("factor_a", self.factor_a), ("factor_b", self.factor_b)):
            weight = factor.weight
            if not isinstance(factor, nn.Linear) or type(weight) not in (nn.Parameter, Tensor):
                kinds = " with a ".join(f"{type(each).__module__}.{type(each).__name__}" for each in (factor, weight))
                raise ValueError(
                    f"{name} of a {type(self).__name__} is a {kinds}, so the product of the factors is unknown. "
                    "Merge adapters first (`merge_and_unload()`); make a model dense before it is quantized."
                )


def _guarding(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or isinstance(parameter, Guard) or parameter.numel():
        return parameter
    guard = Guard(parameter.data, requires_grad=False)
    # Transformers marks what it has loaded; without the mark it would be initialized.
    guard.__dict__.update(parameter.__dict__)
    return guard


class LowRankLinear(FactoredLinear):
    """A linear layer whose weight is the product of two factors: `y = B (A x) + b`.

    `factor_a.weight` is `A`, `[rank, in_features]`; `factor_b.weight` is `B`, `[out_features, rank]`; `factor_b.bias` is
    `b`, `[out_features]`. The factors store `r (m + n)` values, and one token costs as many multiply-adds.

    Args:
        in_features: Size of each input, `n`.
        out_features: Size of each output, `m`.
        rank: Inner dimension, in `[1, min(m, n)]`.
        bias: Whether the layer adds a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: if the rank is outside `[1, min(m, n)]`.
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
            bias: `[out_features]`, or None.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        fits = A.ndim == B.ndim == 2 and len(A) == B.shape[1] and (bias is None or bias.shape == B.shape[:1])
        if not fits:
            raise ValueError(
                f"The factors do not fit: A is {list(A.shape)}, B is {list(B.shape)}, the bias is "
                f"{None if bias is None else list(bias.shape)}. Expected are [rank, in_features], [out_features, rank] "
                "and [out_features] or None."
            )
        layer = cls(A.shape[1], B.shape[0], A.shape[0], bias=bias is not None, device="meta", dtype=A.dtype)
        layer._set_factors(A, B)
        if bias is not None:
            layer.factor_b.bias = nn.Parameter(bias.detach().contiguous())
        return layer

    @property
    def bias(self) -> Tensor | None:
        """See `FactoredLinear.bias`."""
        return self.factor_b.bias

    def set_bias(self, bias: Tensor) -> None:
        """See `FactoredLinear.set_bias`."""
        self.factor_b.bias = new_parameter(bias, self.factor_b.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        # Through the modules, never through their weights: they may be replaced by quantized or adapted ones.
        return self.factor_b(self.factor_a(input))

    def second_factor(self) -> Tensor:
        """See `FactoredLinear.second_factor`."""
        self._check_factors()
        return self.factor_b.weight

    def product(self) -> Tensor:
        """See `FactoredLinear.product`; here `B A`."""
        self._check_factors()
        return to_float64(self.factor_b.weight) @ to_float64(self.factor_a.weight)


def new_parameter(values: Tensor, old: Tensor) -> nn.Parameter:
    """Return a parameter with new values in place of an old one, which another model may share and which stays as it is."""
    return nn.Parameter(values.detach().to(old), requires_grad=old.requires_grad)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `model` has a submodule called `name`."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = owner.get_submodule(child)
    setattr(owner, child, module)
    # Some, such as the prediction heads of OneFormer, call their submodules through a list of their own.
    for held in vars(owner).values():
        if isinstance(held, list):
            held[:] = [module if each is old else each for each in held]
