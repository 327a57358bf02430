"""The factored linear layer. Needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """A linear layer whose weight is the product of two factors: `y = B (A x) + b`.

    The factors are ordinary `nn.Linear` modules, so that quantizers and PEFT find what they know:
    `factor_a.weight` is `A`, `[rank, in_features]`; `factor_b.weight` is `B`, `[out_features, rank]`;
    `factor_b.bias` is `b`, `[out_features]`. One token costs `rank * (in_features + out_features)` multiply-adds.

    `weight` is an empty parameter. It stands where a dense layer has its weight: a program that does not know this
    layer and expects a dense one stops with a size mismatch instead of going on with random weights.

    Args:
        in_features: Size of each input, `n`.
        out_features: Size of each output, `m`.
        rank: Inner dimension, in `[1, min(m, n)]`.
        bias: Whether the layer adds a bias.

    Raises:
        ValueError: if the rank is outside `[1, min(in_features, out_features)]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
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
        self.factor_a = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.factor_b = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        # A parameter rather than a buffer: buffers of size zero break disk offload in Transformers 4.57.
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

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

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        # Through the modules, never through their weights: they may be replaced by quantized or adapted ones.
        return self.factor_b(self.factor_a(input))

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same function, `W = B A` multiplied in float64 and rounded once."""
        A, B = self.factor_a.weight, self.factor_b.weight
        dense = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=A.dtype
        )
        # Apple's GPUs have no float64.
        compute = torch.device("cpu") if A.device.type == "mps" else A.device
        product = B.detach().to(compute, torch.float64) @ A.detach().to(compute, torch.float64)
        dense.weight = nn.Parameter(product.to(A.device, A.dtype), requires_grad=A.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        dense, factored = self.in_features * self.out_features, self.rank * (self.in_features + self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, kept={factored / dense:.1%}"
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `model` has a submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
