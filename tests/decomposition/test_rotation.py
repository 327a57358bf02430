"""Rotated factors compute the same, and 8 bits between them cost less than between pivoted ones."""

import torch

from optimum_mixrank.decomposition.pivoting import pivot_rows
from optimum_mixrank.decomposition.rotation import rotated_factors


GENERATOR = torch.Generator().manual_seed(0)


def factors(out_features=48, rank=16, in_features=32):
    A = torch.randn(rank, in_features, generator=GENERATOR, dtype=torch.float64)
    B = torch.randn(out_features, rank, generator=GENERATOR, dtype=torch.float64)
    # Channels of very different size, as trained layers have them.
    return A * torch.logspace(0, -3, rank, dtype=torch.float64)[:, None], B


def test_the_product_stays_and_columns_are_orthonormal():
    A, B = factors()
    rotated_A, rotated_B = rotated_factors(A, B)
    torch.testing.assert_close(rotated_B @ rotated_A, B @ A)
    torch.testing.assert_close(rotated_B.T @ rotated_B, torch.eye(16, dtype=torch.float64))
    again_A, again_B = rotated_factors(A, B)
    assert torch.equal(again_A, rotated_A) and torch.equal(again_B, rotated_B)


def test_more_columns_than_rows_become_as_many_as_rows():
    A, B = factors(out_features=8, rank=16)
    rotated_A, rotated_B = rotated_factors(A, B)
    assert rotated_A.shape == (8, 32) and rotated_B.shape == (8, 8)
    torch.testing.assert_close(rotated_B @ rotated_A, B @ A)


def test_rounding_between_the_factors_costs_less_than_between_pivoted_ones():
    A, B = factors()
    pivoting = pivot_rows(A, B)
    order = [*pivoting.pivots.tolist(), *(row for row in range(48) if row not in set(pivoting.pivots.tolist()))]
    pivoted = torch.zeros(48, 16, dtype=torch.float64)
    pivoted[order] = torch.cat([torch.eye(16, dtype=torch.float64), pivoting.C])
    x = torch.randn(500, 32, generator=GENERATOR, dtype=torch.float64)

    def error(first, second):
        between = x @ first.T
        step = between.abs().max() / 127
        return float(((step * torch.round(between / step) - between) @ second.T).norm())

    torch.testing.assert_close(pivoted @ pivoting.A, B @ A)
    assert error(*rotated_factors(A, B)) < 0.7 * error(pivoting.A, pivoted)
