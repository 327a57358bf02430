r"""Coordinates in which a step of a given size matters equally in all directions.

The inputs of a Vision Transformer's layers have very unequal variance in different directions, and predictions depend
on few directions of their outputs, so a step that is small in most entries of a factor can be large in some. With the
second moment `S = E[x xᵀ]` of a layer's inputs and the Fisher information `F = E[g gᵀ]` of its outputs, an error `ΔW`
costs about `½ tr(F ΔW S ΔWᵀ)` (K-FAC, arXiv 1503.05671). In terms of the factors `Ã = A S^{1/2}` and `B̃ = F^{1/2} B`
this cost is the plain squared norm. Adam takes its steps there: `ΔA = ΔÃ S^{-1/2}`, with moments of the gradients
`∂Ã = ∂A S^{-1/2}`; the model itself still runs with `A` and `B`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition import balance


@dataclass(frozen=True)
class Roots:
    """Symmetric square root of a damped second moment, and its inverse, each `[size, size]`, float64.

    The moment is first divided by its mean diagonal, since the learning rate takes care of the scale.
    """

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> Roots:
        """Return the roots of a second moment.

        Args:
            moment: `[size, size]`, symmetric positive semidefinite; zero is treated as the identity.
            damping: Share of the mean diagonal that is added to the diagonal.
        """
        moment = moment.double()
        scale = moment.diagonal().mean()
        if not scale > 0:
            identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            return cls(identity, identity)
        values, vectors = torch.linalg.eigh(moment / scale)
        values = values.clamp_min(0) + damping
        return cls((vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T)


def whitened_balance(A: Tensor, B: Tensor, inputs: Roots, outputs: Roots) -> tuple[Tensor, Tensor, float]:
    """Balance factors in whitened coordinates, that is as `Ã` and `B̃`; their product stays the same.

    Args:
        A: `[r, n]`, float64.
        B: `[m, r]`, float64.
        inputs: Roots of the inputs' second moment, `[n, n]`.
        outputs: Roots of the outputs' Fisher information, `[m, m]`.

    Returns:
        The new `A` and `B`, and the root mean square of the entries of `Ã` and `B̃`.
    """
    whitened_A, whitened_B = balance(A @ inputs.root, outputs.root @ B)
    energy = whitened_A.square().sum() + whitened_B.square().sum()
    size = whitened_A.numel() + whitened_B.numel()
    return whitened_A @ inputs.inverse, outputs.inverse @ whitened_B, float((energy / size).sqrt())


class WhitenedAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) whose parameter groups may have their own linear coordinates.

    A group is a dict with `params` and optionally `left`, `[m, m]`, and `right`, `[n, n]`, both symmetric: a parameter
    `P`, `[m, n]`, is `left P̃ right`, and Adam's step is taken on `P̃`, with `lr` as its size there.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "left": None, "right": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step from the gradients of the parameters; those without a gradient do not change."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    step = self._direction(_transformed(parameter.grad, group), state, group)
                    parameter.sub_(_transformed(step, group), alpha=group["lr"])

    def _direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return Adam's step for a learning rate of one."""
        if not state:
            state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        for name, value, beta in zip(("mean", "square"), (gradient, gradient.square()), group["betas"], strict=True):
            state[name].lerp_(value, 1 - beta)
        mean, square = (
            state[name] / (1 - beta ** state["step"])
            for name, beta in zip(("mean", "square"), group["betas"], strict=True)
        )
        return mean / (square.sqrt() + group["eps"])


def _transformed(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """Return `left tensor right`."""
    if group["left"] is not None:
        tensor = group["left"] @ tensor
    return tensor if group["right"] is None else tensor @ group["right"]
