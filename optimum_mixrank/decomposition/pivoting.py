"""The pivoted layout: an exact re-parametrisation of a low-rank product that stores fewer values.

A product `B A` of rank r does not change under `B → B T⁻¹`, `A → T A`. With `T` made of r rows of `B` these rows become
the identity, so that only the other `m - r` are stored: `r (m + n) - r²` values instead of `r (m + n)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pivoting(NamedTuple):
    """A product `B A` by its pivot rows.

    Attributes:
        pivots: The pivot rows, int64, `[rank]`, ascending.
        A: The pivot rows of the product, `[rank, in_features]`, float64.
        C: The other rows, ascending, as combinations of the pivot rows, `[out_features - rank, rank]`, float64.
    """

    pivots: Tensor
    A: Tensor
    C: Tensor

    @property
    def growth(self) -> float:
        """Largest absolute coefficient: by how much a rounding error of a pivot row may be enlarged per term."""
        return float(self.C.abs().max()) if self.C.numel() else 0.0


def pivot_rows(A: Tensor, B: Tensor, max_coefficient: float = 1.05, max_swaps: int = 10_000) -> Pivoting:
    """Choose rows of `B A` of which all others are combinations with small coefficients.

    LU with row pivoting gives the first choice; then, as long as a coefficient is larger than `max_coefficient`, its
    row and its pivot change places, which multiplies the volume of the pivot rows by that coefficient (the maximum
    volume algorithm of Goreinov et al., How to find a good submatrix, 2010). A submatrix of maximal volume has no
    coefficient above 1.

    Args:
        A: `[rank, in_features]`.
        B: `[out_features, rank]`, with `rank < out_features`.
        max_coefficient: At which to stop, above 1.
        max_swaps: At which to stop, whatever the coefficients.

    Raises:
        ValueError: if no row would be left.
    """
    m, rank = B.shape
    if rank >= m:
        raise ValueError(f"A product of rank {rank} with {m} rows has no rows to combine from others.")
    # The same product with orthonormal columns; where B lacks rank they are completed, and A gets rows of zeros.
    B, S, Vh = torch.linalg.svd(B.double(), full_matrices=False)
    A = (S[:, None] * Vh) @ A.double()
    _, transpositions = torch.linalg.lu_factor(B)
    rows = _permutation(transpositions, m)
    # All rows as combinations of the pivot rows, those included: `coefficients[rows[:rank]]` is the identity.
    coefficients = torch.linalg.solve(B[rows[:rank]], B, left=False)
    pivots = rows[:rank].clone()
    for _ in range(max_swaps):
        flat = int(coefficients.abs().argmax())
        row, column = divmod(flat, rank)
        value = coefficients[row, column].clone()
        if value.abs() <= max_coefficient:
            break
        pivots[column] = row
        # The change of one pivot row is a change of rank one.
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients = coefficients - coefficients[:, column : column + 1] * (change / value)
    pivots = pivots.sort().values
    is_pivot = torch.zeros(m, dtype=torch.bool, device=B.device)
    is_pivot[pivots] = True
    C = torch.linalg.solve(B[pivots], B[~is_pivot], left=False)
    return Pivoting(pivots, B[pivots] @ A, C)


def _permutation(transpositions: Tensor, size: int) -> Tensor:
    """Rows in the order that LAPACK's successive transpositions (counted from 1) bring them into, `[size]`."""
    rows = list(range(size))
    for position, other in enumerate(transpositions.tolist()):
        rows[position], rows[other - 1] = rows[other - 1], rows[position]
    return torch.tensor(rows, device=transpositions.device)
