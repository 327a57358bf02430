r"""Truncated factorization under a measure of inputs and outputs alike.

With `F`, `[m, m]`, the second moment of the loss gradients at the output and `Σ`, `[n, n]`, the covariance of the
inputs, an error `ΔW` of the weight changes the loss by `½ tr(F ΔW Σ ΔWᵀ)` per token, to second order and if gradients
and inputs are independent (K-FAC, arXiv 1503.05671). With the Cholesky factor `F = L Lᵀ` this is the one-sided measure
of `Lᵀ ΔW`: the best rank-r solution is `Ŵ = L⁻ᵀ U_r U_rᵀ Lᵀ W` with the leading left singular vectors `U_r` of
`Lᵀ W Σ^{1/2}`.

Where `m > n`, only what `F` says about the columns of `W` matters, `QᵀFQ` with an orthonormal basis `Q` of these: the
solution is that of `QᵀW`, `[n, n]`, multiplied by `Q`. It follows from the gradients that the layer passes back,
`E[(Wᵀg)(Wᵀg)ᵀ] = WᵀFW`, so that `F` itself, 16 times as large for the first layer of an MLP, is not needed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .factorization import Decomposition, decompose_by_input, decompose_by_output, root_of_covariance
from .statistics import LayerStatistics, Statistic


def damped(moment: Tensor, damping: float) -> Tensor:
    """`F` plus a share of its mean diagonal, `[m, m]`, so that it can be inverted; the identity if `F` is zero."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    scale = moment.diagonal().mean()
    return identity if scale <= 0 else moment + damping * scale * identity


@dataclass(frozen=True)
class OutputFisher:
    """The damped Fisher information of a layer's output, `[m, m]`, as far as it is known.

    Attributes:
        moment: `F̃`, `[m, m]`; or `QᵀF̃Q`, `[k, k]`, where a basis is given.
        basis: `Q`, `[m, k]`, with orthonormal columns that span those of the original weight; None for the identity.
        outside: What stands for `F̃` on the complement of the basis: its mean diagonal there.
    """

    moment: Tensor
    basis: Tensor | None = None
    outside: float = 0.0

    @classmethod
    def of(cls, weight: Tensor, statistics: LayerStatistics, damping: float) -> OutputFisher:
        """Take it from the statistics of a layer.

        Args:
            weight: The original weight, `[m, n]`, float64.
            statistics: With the moment of the output's gradients, or that of the input's and the energy.
            damping: Share of the mean diagonal that is added.
        """
        if statistics.gradient_moment is not None:
            return cls(damped(statistics.gradient_moment.to(weight), damping))
        energy = statistics.total_gradient_energy.to(weight)
        basis, columns = _basis(weight)
        moment = columns.T @ statistics.require(Statistic.INPUT_GRADIENT_MOMENT).to(weight) @ columns
        identity = torch.eye(len(moment), dtype=weight.dtype, device=weight.device)
        if energy <= 0:
            return cls(identity, basis, 1.0)
        penalty = damping * energy / len(weight)
        rest = (energy - moment.trace()).clamp_min(0) / max(1, len(weight) - len(moment))
        return cls(moment + penalty * identity, basis, float(rest + penalty))

    def decompose(
        self, weight: Tensor, input_covariance: Tensor | None = None, output_covariance: Tensor | None = None
    ) -> Decomposition:
        """See `decompose_two_sided`.

        Args:
            weight: `[m, n]`, float64: the original weight, or one that takes its place.
            input_covariance: `[n, n]`.
            output_covariance: `[m, m]`.
        """
        if self.basis is None:
            return decompose_two_sided(weight, self.moment, input_covariance, output_covariance)
        inside = self.basis.T @ weight
        if (weight - self.basis @ inside).norm() > 1e-6 * weight.norm():
            return decompose_two_sided(weight, self._expanded(self.basis), input_covariance, output_covariance)
        if output_covariance is not None:
            output_covariance = self.basis.T @ output_covariance @ self.basis
        found = decompose_two_sided(inside, self.moment, input_covariance, output_covariance)
        return dataclasses.replace(found, left=self.basis @ found.left)

    def _expanded(self, basis: Tensor) -> Tensor:
        identity = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
        inner = self.moment - self.outside * torch.eye(len(self.moment), dtype=basis.dtype, device=basis.device)
        return self.outside * identity + basis @ inner @ basis.T


def _basis(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`Q`, `[m, k]`, orthonormal, which spans the columns of `W`, and `Z`, `[n, k]`, with `Q = W Z`."""
    Q, R = torch.linalg.qr(weight)
    if len(R) == weight.shape[1]:
        inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
        if torch.linalg.norm(R) * torch.linalg.norm(inverse) < 1e6:
            return Q, inverse
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    # What `WᵀFW` says of smaller directions is lost in its rounding.
    rank = max(1, int((S / S[0] > 1e-6).sum()))
    return Q @ U[:, :rank], Vh[:rank].T / S[:rank].clamp_min(torch.finfo(S.dtype).tiny)


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
