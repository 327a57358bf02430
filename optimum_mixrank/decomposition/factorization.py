r"""Truncated factorizations of a weight under a quadratic measure of the output error.

Let `W` be `[m, n]` and let the inputs have the covariance `Σ = L Lᵀ`, `[n, n]`. The rank-r matrix that minimises the
output error `E ‖(W - Ŵ)(x - μ)‖² = ‖(W - Ŵ) L‖²_F` follows from the singular value decomposition `W L = U S Vᵀ`
(Eckart-Young): `Ŵ L = U_r U_rᵀ W L`, which `Ŵ = U_r (U_rᵀ W)` solves even if `L` is singular. Its error is the tail
energy `s_{r+1}² + … + s_k²`. Only `U` and `S` are needed, and these are the eigenvectors and the square roots of the
eigenvalues of `W Σ Wᵀ`, the covariance of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


_SMALL = 1e-12
"""Columns between this size and its inverse are stored as they are."""


@dataclass(frozen=True)
class Decomposition:
    """The best approximations of a weight for all ranks `r`: `Ŵ_r = left[:, :r] @ right[:r]`.

    Attributes:
        left: `[out_features, k]`.
        right: `[k, in_features]`.
        energies: `[min(m, n)]`, float64, descending: the error that component i removes. The tail energy
            `energies[r:].sum()` is the error of rank r.
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    def tails(self) -> Tensor:
        """Return the tail energies, lost at rank 0, 1, …, k: `[k + 1]`."""
        return torch.cat([self.energies.flip(0).cumsum(0).flip(0), self.energies.new_zeros(1)])

    def losses(self) -> Tensor:
        """Return the share of the energy lost at rank 0, 1, …, k: `[k + 1]`, from 1 to 0; zeros if there is no energy."""
        total, tails = self.energies.sum(), self.tails()
        return tails / total if total > 0 else torch.zeros_like(tails)

    def truncated(self, rank: int, dtype: torch.dtype) -> Decomposition:
        """Return the components for ranks up to `rank`, in `dtype`, with all energies."""
        left, right = self.left[:, :rank], self.right[:rank]
        # Tiny gradients make one side huge and the other one tiny, perhaps beyond the range of `dtype`.
        sizes = left.abs().amax(dim=0)
        extreme = ((sizes < _SMALL) | (sizes > 1 / _SMALL)) & (sizes > 0)
        if extreme.any():
            scale = torch.where(extreme, sizes, torch.ones_like(sizes))
            left, right = left / scale, scale[:, None] * right
        return Decomposition(left.to(dtype).contiguous(), right.to(dtype).contiguous(), self.energies)

    def to(self, device: torch.device | str) -> Decomposition:
        """Return a copy on a device."""
        return Decomposition(self.left.to(device), self.right.to(device), self.energies.to(device))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return balanced factors `A`, `[rank, in_features]`, and `B`, `[out_features, rank]`, in float64."""
        return balance(self.right[:rank].double(), self.left[:, :rank].double())


def decompose_by_output(weight: Tensor, output_moment: Tensor) -> Decomposition:
    """Decompose `W`, `[m, n]`, under the second moment or covariance `W Σ Wᵀ` of the output, `[m, m]`; both float64."""
    energies, vectors = _eigenpairs(output_moment, max(weight.shape), min(weight.shape))
    return _complete(weight, vectors, energies)


def decompose_by_input(weight: Tensor, root: Tensor) -> Decomposition:
    """Decompose under a root of the second moment or covariance of the input.

    Args:
        weight: `[m, n]`, float64.
        root: `L` with `Σ = L Lᵀ`, `[n, p]`, float64; p may be any number.
    """
    output_root = weight @ root
    if output_root.shape[0] <= output_root.shape[1]:
        return decompose_by_output(weight, output_root @ output_root.T)
    energies, vectors = _eigenpairs(output_root.T @ output_root, max(weight.shape), min(weight.shape))
    # W L V = U S. Householder QR instead of a division by S keeps the columns orthonormal where S is small.
    return _complete(weight, torch.linalg.qr(output_root @ vectors).Q, energies)


def extended(found: Decomposition, weight: Tensor) -> Decomposition:
    """Add components without energy to a decomposition of `W`, `[m, n]`, that has fewer than `min(m, n)`.

    They are those of what the others leave of the weight with the largest singular values.
    """
    missing = min(weight.shape) - len(found.energies)
    if missing <= 0:
        return found
    rest = weight - found.left @ found.right
    more = torch.linalg.svd(rest, full_matrices=False).U[:, :missing]
    return Decomposition(
        torch.cat([found.left, more], dim=1),
        torch.cat([found.right, more.T @ rest]),
        torch.cat([found.energies, found.energies.new_zeros(missing)]),
    )


def root_of_covariance(covariance: Tensor) -> Tensor:
    """Return a root `L`, `[n, p]`, of a symmetric positive semidefinite `Σ = L Lᵀ`, `[n, n]`, where p is its rank.

    Eigenvalues that rounding cannot tell from zero are left out; nothing is added to the diagonal.
    """
    eigenvalues, vectors = _eigenpairs(covariance, len(covariance), len(covariance))
    return vectors * eigenvalues.sqrt()


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the product of `A`, `[r, n]`, and `B`, `[m, r]`, so that `A Aᵀ = Bᵀ B` is diagonal.

    The diagonal holds the singular values of `B A`. Both factors then have the same scale, as half precision, weight
    quantization and gradient steps need.
    """
    Qa, Ra = torch.linalg.qr(A.T)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    scale = S.sqrt()
    return (scale[:, None] * Vh) @ Qa.T, (Qb @ U) * scale


def corrected_bias(weight: Tensor, bias: Tensor, product: Tensor, input_mean: Tensor) -> Tensor:
    """Return the bias `b + (W - Ŵ) μ`, which leaves the mean output unchanged, `[out_features]`, float64.

    Args:
        weight: `W`, `[m, n]`.
        bias: `b`, `[m]`.
        product: `Ŵ`, `[m, n]`, the product of the factors as stored.
        input_mean: `μ`, `[n]`.
    """
    product = product.double()
    return bias.detach().to(product) + (weight.to(product) - product) @ input_mean.to(product)


def _eigenpairs(moment: Tensor, size: int, most: int) -> tuple[Tensor, Tensor]:
    """Return at most `most` eigenvalues of a positive semidefinite matrix, descending, and their eigenvectors.

    Those that rounding, at a matrix size of `size`, cannot tell from zero are left out.
    """
    eigenvalues, vectors = torch.linalg.eigh(moment)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    tolerance = eigenvalues[:1] * size * torch.finfo(eigenvalues.dtype).eps
    rank = min(int((eigenvalues > tolerance).sum()), most)
    return eigenvalues[:rank], vectors[:, :rank]


def _complete(weight: Tensor, left: Tensor, energies: Tensor) -> Decomposition:
    """Add components up to full rank for the directions that the data never reach.

    Any choice there has the same error on the calibration data. Taking the components of the remaining weight with the
    largest singular values changes the output least for inputs unlike the calibration data.
    """
    size = min(weight.shape)
    missing = size - left.shape[1]
    right = left.T @ weight
    if missing > 0:
        rest = weight - left @ right
        more = torch.linalg.svd(rest, full_matrices=False).U[:, :missing]
        # The rest is orthogonal to `left` up to rounding; if it vanishes, its singular vectors are arbitrary.
        more = more - left @ (left.T @ more)
        left = torch.cat([left, more], dim=1)
        right = torch.cat([right, more.T @ rest])
        energies = torch.cat([energies, energies.new_zeros(missing)])
    return Decomposition(left, right, energies)
