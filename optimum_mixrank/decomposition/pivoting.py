"""The pivoted layout: an exact reparametrisation of a low-rank product that stores fewer values.

A product `B A` of rank r does not change under `B → B T⁻¹`, `A → T A`. If `T` consists of r rows of `B`, these rows
become the identity and only the other `m - r` are stored: `r (m + n) - r²` values instead of `r (m + n)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pivoting(NamedTuple):
    """A product `B A` expressed by its pivot rows.

    Attributes:
        pivots: Indices of the pivot rows, int64, `[rank]`, ascending.
        A: The pivot rows of the product, `[rank, in_features]`, float64.
        C: Coefficients of the other rows, ascending, in the pivot rows, `[out_features - rank, rank]`, float64.
    """

    pivots: Tensor
    A: Tensor
    C: Tensor

    @property
    def growth(self) -> float:
        """The largest absolute coefficient, by which a rounding error of a pivot row may be magnified in another row."""
        return float(self.C.abs().max()) if self.C.numel() else 0.0


def pivot_rows(A: Tensor, B: Tensor, max_coefficient: float = 1.05, max_swaps: int = 10_000) -> Pivoting:
    """Choose pivot rows of `B A` such that all other rows are combinations of them with small coefficients.

    LU with row pivoting gives the first choice. Then, as long as a coefficient exceeds `max_coefficient`, its row and
    its pivot row are swapped, which multiplies the volume of the pivot rows by that coefficient (the maximum volume
    algorithm of Goreinov et al., How to find a good submatrix, 2010). A submatrix of maximal volume has no coefficient
    above 1.

    Args:
        A: `[rank, in_features]`.
        B: `[out_features, rank]`, with `rank < out_features`.
        max_coefficient: The largest coefficient to accept, above 1.
        max_swaps: The number of swaps after which to stop in any case.

    Raises:
        ValueError: if every row would be a pivot row.
    """
    m, rank = B.shape
    if rank >= m:
        raise ValueError(f"A product of rank {rank} with {m} rows has no rows to combine from pivot rows.")
    # The same product with orthonormal columns in B. If B is rank-deficient, they are completed and A gets zero rows.
    B, S, Vh = torch.linalg.svd(B.double(), full_matrices=False)
    A = (S[:, None] * Vh) @ A.double()
    _, transpositions = torch.linalg.lu_factor(B)
    rows = _permutation(transpositions, m)
    # Every row, pivot rows included, as a combination of pivot rows: `coefficients[rows[:rank]]` is the identity.
    coefficients = torch.linalg.solve(B[rows[:rank]], B, left=False)
    pivots = rows[:rank].clone()
    for _ in range(max_swaps):
        flat = int(coefficients.abs().argmax())
        row, column = divmod(flat, rank)
        value = coefficients[row, column].clone()
        if value.abs() <= max_coefficient:
            break
        pivots[column] = row
        # Exchanging one pivot row is a rank-one update.
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients = coefficients - coefficients[:, column : column + 1] * (change / value)
    pivots = pivots.sort().values
    is_pivot = torch.zeros(m, dtype=torch.bool, device=B.device)
    is_pivot[pivots] = True
    C = torch.linalg.solve(B[pivots], B[~is_pivot], left=False)
    return Pivoting(pivots, B[pivots] @ A, C)


def _permutation(transpositions: Tensor, size: int) -> Tensor:
    """Return the order of rows after LAPACK's successive transpositions, which count from 1, `[size]`."""
    rows = list(range(size))
    for position, other in enumerate(transpositions.tolist()):
        rows[position], rows[other - 1] = rows[other - 1], rows[position]
    return torch.tensor(rows, device=transpositions.device)
