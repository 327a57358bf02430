r"""Truncated factorization under a measure of inputs and outputs alike.

With `F`, `[m, m]`, the second moment of the loss gradients at the output and `Σ`, `[n, n]`, the covariance of the
inputs, an error `ΔW` of the weight changes the loss by `½ tr(F ΔW Σ ΔWᵀ)` per token, to second order and if gradients
and inputs are independent (K-FAC, arXiv 1503.05671). With the Cholesky factor `F = L Lᵀ` this is the one-sided measure
of `Lᵀ ΔW`: the best rank-r solution is `Ŵ = L⁻ᵀ U_r U_rᵀ Lᵀ W` with the leading left singular vectors `U_r` of
`Lᵀ W Σ^{1/2}`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .factorization import Decomposition, decompose_by_input, decompose_by_output, root_of_covariance


def damped(moment: Tensor, damping: float) -> Tensor:
    """`F` plus a share of its mean diagonal, `[m, m]`, so that it can be inverted; the identity if `F` is zero."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    scale = moment.diagonal().mean()
    return identity if scale <= 0 else moment + damping * scale * identity


def decompose_two_sided(
    weight: Tensor,
    gradient_moment: Tensor,
    input_covariance: Tensor | None = None,
    output_covariance: Tensor | None = None,
) -> Decomposition:
    """Decompose under `tr(F ΔW Σ ΔWᵀ)`; one of the two covariances is needed.

    Args:
        weight: `W`, `[m, n]`, float64.
        gradient_moment: `F`, `[m, m]`, float64, positive definite (see `damped`).
        input_covariance: `Σ`, `[n, n]`.
        output_covariance: `W Σ Wᵀ`, `[m, m]`.
    """
    lower = torch.linalg.cholesky(gradient_moment)
    scaled = lower.T @ weight
    if output_covariance is not None:
        inner = decompose_by_output(scaled, lower.T @ output_covariance @ lower)
    elif input_covariance is None:
        raise ValueError("Either the covariance of the inputs or that of the outputs is needed.")
    elif len(weight) <= weight.shape[1]:
        inner = decompose_by_output(scaled, scaled @ input_covariance @ scaled.T)
    else:
        inner = decompose_by_input(scaled, root_of_covariance(input_covariance))
    return dataclasses.replace(inner, left=torch.linalg.solve_triangular(lower.T, inner.left, upper=True))
