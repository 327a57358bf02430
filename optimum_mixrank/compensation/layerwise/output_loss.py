"""The distance between the outputs of a layer and their targets, computed from moments alone."""

from __future__ import annotations

from torch import Tensor


def output_loss(weight: Tensor, input_moment: Tensor, target_moment: Tensor) -> Tensor:
    """Return `E ‖t - Ŵ x‖²` without the term `E ‖t‖²`, which does not depend on `Ŵ`: `tr(Ŵ S Ŵᵀ) - 2 tr(Ŵ S_tᵀ)`.

    Args:
        weight: `Ŵ`, `[m, n]`.
        input_moment: `S = E x xᵀ`, `[n, n]`, or the covariance.
        target_moment: `S_t = E t xᵀ`, `[m, n]`, or the covariance.
    """
    return ((weight @ input_moment) * weight).sum() - 2 * (weight * target_moment).sum()


def output_loss_of_factors(A: Tensor, B: Tensor, input_moment: Tensor, target_moment: Tensor) -> Tensor:
    """Return `output_loss` of `B A`, as `tr(BᵀB A S Aᵀ) - 2 tr(Bᵀ S_t Aᵀ)`, whose products all have rank r at most.

    Args:
        A: `[r, n]`.
        B: `[m, r]`.
        input_moment: `S`, `[n, n]`.
        target_moment: `S_t`, `[m, n]`.
    """
    return ((B.T @ B) * (A @ input_moment @ A.T)).sum() - 2 * (B.T * (A @ target_moment.T)).sum()
