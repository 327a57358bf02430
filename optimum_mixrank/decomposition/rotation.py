"""A basis between two factors in which rounding harms least.

A product `B A` of rank r does not change under `B → B T⁻¹`, `A → T A`. With `B = Q R` (QR factorization), `T = Oᵀ R` for an
orthogonal `O` gives `B T⁻¹ = Q O`, whose columns are orthonormal: an error of the vector between the factors reaches the
output with its own norm, where the coefficients of the pivoted layout would amplify it. A random `O` spreads the variance
evenly over the entries of that vector, so that one range of 8 bits suits all of them (incoherence processing, Chee et al.,
QuIP, arXiv 2307.13304; for activations Ashkboos et al., QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.precision import to_float64


def rotated_factors(A: Tensor, B: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors of the same product, the second with orthonormal columns in a random basis.

    Args:
        A: First factor, `[rank, in_features]`.
        B: Second factor, `[out_features, rank]`.
        seed: Seed of the random basis.

    Returns:
        A and B, float64, of at most `out_features` rows and columns in between.
    """
    Q, R = torch.linalg.qr(to_float64(B))
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(R.shape[0], R.shape[0], generator=generator, dtype=torch.float64)
    O = torch.linalg.qr(normal).Q.to(R.device)  # noqa: E741 - orthogonal
    return O.T @ (R @ to_float64(A)), Q @ O
