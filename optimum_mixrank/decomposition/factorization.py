r"""Truncated factorizations of a weight under a quadratic measure of the output.

Let `W` be `[m, n]` and let the inputs have the covariance `Σ = L Lᵀ`, `[n, n]`. The rank-r matrix that minimises the
output error `E ‖(W - Ŵ)(x - μ)‖² = ‖(W - Ŵ) L‖²_F` follows from the singular value decomposition `W L = U S Vᵀ`
(Eckart-Young): `Ŵ L = U_r U_rᵀ W L`, which `Ŵ = U_r (U_rᵀ W)` solves, also where `L` is singular. Its error is the tail
energy `s_{r+1}² + … + s_k²`. Only `U` and `S` are needed, and they are also the eigenvectors and the square roots of
the eigenvalues of `W Σ Wᵀ`, the covariance of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """Best approximations of all ranks `r`: `Ŵ_r = left[:, :r] @ right[:r]`.

    Attributes:
        left: `[out_features, k]`.
        right: `[k, in_features]`.
        energies: `[min(m, n)]`, float64, descending: the error that component i removes. The tail
            `energies[r:].sum()` is the error of rank r.
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    def tails(self) -> Tensor:
        """Energy that is lost at rank 0, 1, …, k: `[k + 1]`."""
        return torch.cat([self.energies.flip(0).cumsum(0).flip(0), self.energies.new_zeros(1)])

    def losses(self) -> Tensor:
        """Share of the energy that is lost at rank 0, 1, …, k: `[k + 1]`, from 1 to 0; zeros if there is no energy."""
        total, tails = self.energies.sum(), self.tails()
        return tails / total if total > 0 else torch.zeros_like(tails)

    def truncated(self, rank: int, dtype: torch.dtype) -> Decomposition:
        """Keep components for ranks up to `rank`, stored in `dtype`, and all energies."""
        return Decomposition(
            self.left[:, :rank].to(dtype).contiguous(), self.right[:rank].to(dtype).contiguous(), self.energies
        )

    def to(self, device: torch.device | str) -> Decomposition:
        """The same on another device."""
        return Decomposition(self.left.to(device), self.right.to(device), self.energies.to(device))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Balanced factors `A`, `[rank, in_features]`, and `B`, `[out_features, rank]`, in float64."""
        return balance(self.right[:rank].double(), self.left[:, :rank].double())


def decompose_by_output(weight: Tensor, output_moment: Tensor) -> Decomposition:
    """Decompose under the second moment or covariance of the output.

    Args:
        weight: `[m, n]`, float64.
        output_moment: `W Σ Wᵀ`, `[m, m]`, float64, symmetric.
    """
    energies, vectors = torch.linalg.eigh(output_moment)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    rank = min(_numerical_rank(energies, max(weight.shape)), min(weight.shape))
    return _complete(weight, vectors[:, :rank], energies[:rank])


def decompose_by_input(weight: Tensor, root: Tensor) -> Decomposition:
    """Decompose under a root of the second moment or covariance of the input.

    Args:
        weight: `[m, n]`, float64.
        root: `L` with `Σ = L Lᵀ`, `[n, p]`, float64, for any p.
    """
    output_root = weight @ root
    if output_root.shape[0] <= output_root.shape[1]:
        return decompose_by_output(weight, output_root @ output_root.T)
    energies, vectors = torch.linalg.eigh(output_root.T @ output_root)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    rank = min(_numerical_rank(energies, max(weight.shape)), min(weight.shape))
    # W L V = U S. Householder QR instead of a division by S keeps the columns orthonormal where S is small.
    left = torch.linalg.qr(output_root @ vectors[:, :rank]).Q
    return _complete(weight, left, energies[:rank])


def root_of_covariance(covariance: Tensor) -> Tensor:
    """A root `L`, `[n, p]`, of a symmetric positive semidefinite `Σ = L Lᵀ`, `[n, n]`, where p is its rank.

    Eigenvalues that rounding cannot tell from zero are left out; nothing is added to the diagonal.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    rank = _numerical_rank(eigenvalues, len(eigenvalues))
    return vectors[:, :rank] * eigenvalues[:rank].sqrt()


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product and `A Aᵀ = Bᵀ B`, diagonal: the singular values of `B A`, split evenly.

    Both factors then have the same scale, which half precision, weight quantization and gradient steps need.

    Args:
        A: `[r, n]`.
        B: `[m, r]`.
    """
    Qa, Ra = torch.linalg.qr(A.T)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    scale = S.sqrt()
    return (scale[:, None] * Vh) @ Qa.T, (Qb @ U) * scale


def corrected_bias(weight: Tensor, bias: Tensor, product: Tensor, input_mean: Tensor) -> Tensor:
    """The bias `b + (W - Ŵ) μ` with which the mean output stays what it was, `[out_features]`, float64.

    Args:
        weight: `W`, `[m, n]`.
        bias: `b`, `[m]`.
        product: `Ŵ`, `[m, n]`, of the factors as they are stored.
        input_mean: `μ`, `[n]`.
    """
    product = product.double()
    return bias.detach().to(product) + (weight.to(product) - product) @ input_mean.to(product)


def _numerical_rank(eigenvalues: Tensor, size: int) -> int:
    """How many eigenvalues (descending) of a positive semidefinite matrix rounding can tell from zero."""
    if len(eigenvalues) == 0 or eigenvalues[0] <= 0:
        return 0
    return int((eigenvalues > eigenvalues[0] * size * torch.finfo(eigenvalues.dtype).eps).sum())


def _complete(weight: Tensor, left: Tensor, energies: Tensor) -> Decomposition:
    """Add components for the directions that the data never reached, up to full rank.

    There every choice has the same error on the calibration data. The components of the remaining weight with the
    largest singular values are taken, so that inputs unlike the calibration data change least.
    """
    size = min(weight.shape)
    missing = size - left.shape[1]
    right = left.T @ weight
    if missing > 0:
        rest = weight - left @ right
        more = torch.linalg.svd(rest, full_matrices=False).U[:, :missing]
        # The rest is orthogonal to `left` up to rounding; where it vanishes its singular vectors are arbitrary.
        more = more - left @ (left.T @ more)
        left = torch.cat([left, more], dim=1)
        right = torch.cat([right, more.T @ rest])
        energies = torch.cat([energies, energies.new_zeros(missing)])
    return Decomposition(left, right, energies)
