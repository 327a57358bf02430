r"""Truncated factorization under a two-sided measure, of inputs and gradients.

With `F`, `[m, m]`, the second moment of the loss gradients at the output and `Σ`, `[n, n]`, the covariance of the
inputs, an error `ΔW` of the weight changes the loss by `½ tr(F ΔW Σ ΔWᵀ)` per token, to second order and if gradients
and inputs are independent (K-FAC, arXiv 1503.05671). With the Cholesky factor `F = L Lᵀ` this is the one-sided measure
of `Lᵀ ΔW`: the best rank-r solution is `Ŵ = L⁻ᵀ U_r U_rᵀ Lᵀ W` with the leading left singular vectors `U_r` of
`Lᵀ W Σ^{1/2}`.

If `m > n`, only the restriction of `F` to the column space of `W` matters, `QᵀFQ` with an orthonormal basis `Q`: the
solution is that of `QᵀW`, `[n, n]`, multiplied by `Q`. It follows from the gradients of the input,
`E[(Wᵀg)(Wᵀg)ᵀ] = WᵀFW`, so that `F` itself, 16 times as large for the first layer of an MLP, is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .factorization import Decomposition, decompose_by_input, decompose_by_output, extended, root_of_covariance
from .statistics import LayerStatistics, Statistic


_SMALLEST_EIGENVALUE = 1e-6
"""Share of the largest eigenvalue to which those are raised that rounding has made negative."""


_TINY = 1e-200
"""Size of moments from which on their rounding is all that they hold."""


def damped(moment: Tensor, damping: float) -> Tensor:
    """Return `F`, `[m, m]`, with a share of its mean diagonal added to the diagonal; the identity if `F` is zero."""
    identity = _identity_like(moment)
    scale = moment.diagonal().mean()
    return identity if scale <= _TINY else moment + damping * scale * identity


@dataclass(frozen=True)
class OutputFisher:
    """The damped Fisher information `F̃` of a layer's output, `[m, m]`, as far as it is known.

    Attributes:
        moment: `F̃`, `[m, m]`; or `QᵀF̃Q`, `[k, k]`, if there is a basis.
        basis: `Q`, `[m, k]`, orthonormal, which spans the columns of the original weight; None for the identity.
        outside: The mean diagonal of `F̃` on the complement of the basis, where no more is known of it.
    """

    moment: Tensor
    basis: Tensor | None = None
    outside: float = 0.0

    @classmethod
    def of(cls, weight: Tensor, statistics: LayerStatistics, damping: float) -> OutputFisher:
        """Derive it from the original weight, `[m, n]`, float64, and the gradient statistics of a layer.

        `damping` is the share of the mean diagonal that is added to the diagonal.
        """
        if statistics.gradient_moment is not None:
            return cls(damped(statistics.gradient_moment.to(weight), damping))
        energy = statistics.total_gradient_energy.to(weight)
        basis, columns = _basis(weight)
        moment = columns.T @ statistics.require(Statistic.INPUT_GRADIENT_MOMENT).to(weight) @ columns
        identity = _identity_like(moment)
        if energy <= 0:
            return cls(identity, basis, 1.0)
        penalty = damping * energy / len(weight)
        rest = (energy - moment.trace()).clamp_min(0) / max(1, len(weight) - len(moment))
        return cls(moment + penalty * identity, basis, float(rest + penalty))

    def decompose(
        self, weight: Tensor, input_covariance: Tensor | None = None, output_covariance: Tensor | None = None
    ) -> Decomposition:
        """Decompose the original weight or one that takes its place; see `decompose_two_sided`."""
        if self.basis is None:
            return decompose_two_sided(weight, self.moment, input_covariance, output_covariance)
        inside = self.basis.T @ weight
        if (weight - self.basis @ inside).norm() > 1e-6 * weight.norm():
            inner = self.moment - self.outside * _identity_like(self.moment)
            expanded = self.outside * _identity_like(self.basis) + self.basis @ inner @ self.basis.T
            return decompose_two_sided(weight, expanded, input_covariance, output_covariance)
        if output_covariance is not None:
            output_covariance = self.basis.T @ output_covariance @ self.basis
        found = decompose_two_sided(inside, self.moment, input_covariance, output_covariance)
        # The basis has fewer than `min(m, n)` columns if the original weight is rank-deficient.
        return extended(replace(found, left=self.basis @ found.left), weight)


def _identity_like(rows: Tensor) -> Tensor:
    return torch.eye(len(rows), dtype=rows.dtype, device=rows.device)


def _basis(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis `Q`, `[m, k]`, of the columns of `W`, and `Z`, `[n, k]`, with `Q = W Z`."""
    Q, R = torch.linalg.qr(weight)
    if len(R) == weight.shape[1]:
        inverse = torch.linalg.solve_triangular(R, _identity_like(R), upper=True)
        if torch.linalg.norm(R) * torch.linalg.norm(inverse) < 1e6:
            return Q, inverse
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    # `WᵀFW` says nothing about smaller directions that its own rounding does not hide.
    rank = max(1, int((S / S[0] > 1e-6).sum()))
    return Q @ U[:, :rank], Vh[:rank].T / S[:rank].clamp_min(torch.finfo(S.dtype).tiny)


def lower_root(moment: Tensor) -> Tensor:
    """Return the Cholesky factor of a matrix that is positive definite up to rounding."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not failed and bool(torch.isfinite(lower).all()):
        return lower
    # Gradients near the smallest numbers of float32 have moments that their rounding leaves indefinite.
    scale = float(moment.diagonal().max())
    if not scale > _TINY:
        return _identity_like(moment)
    symmetric = (moment + moment.T) / (2 * scale)
    try:
        values, vectors = torch.linalg.eigh(symmetric)
        symmetric = (vectors * values.clamp_min(_SMALLEST_EIGENVALUE * values[-1])) @ vectors.T
    except torch.linalg.LinAlgError:
        pass
    # What is added grows until the diagonal dominates.
    for jitter in (0.0, 1e-12, 1e-9, 1e-6, 1e-3):
        lower, failed = torch.linalg.cholesky_ex(symmetric + jitter * _identity_like(moment))
        if not failed:
            return lower * scale**0.5
    return torch.diag(moment.diagonal().clamp_min(_SMALLEST_EIGENVALUE * scale).sqrt())


def decompose_two_sided(
    weight: Tensor,
    gradient_moment: Tensor,
    input_covariance: Tensor | None = None,
    output_covariance: Tensor | None = None,
) -> Decomposition:
    """Decompose under `tr(F ΔW Σ ΔWᵀ)`; raises a `ValueError` unless one of the two covariances is given.

    Args:
        weight: `W`, `[m, n]`, float64.
        gradient_moment: `F`, `[m, m]`, float64, positive definite (see `damped`).
        input_covariance: `Σ`, `[n, n]`.
        output_covariance: `W Σ Wᵀ`, `[m, m]`.
    """
    lower = lower_root(gradient_moment)
    scaled = lower.T @ weight
    if output_covariance is not None:
        inner = decompose_by_output(scaled, lower.T @ output_covariance @ lower)
    elif input_covariance is None:
        raise ValueError("Either the covariance of the inputs or that of the outputs is needed.")
    elif len(weight) <= weight.shape[1]:
        inner = decompose_by_output(scaled, scaled @ input_covariance @ scaled.T)
    else:
        inner = decompose_by_input(scaled, root_of_covariance(input_covariance))
    return replace(inner, left=torch.linalg.solve_triangular(lower.T, inner.left, upper=True))
