"""Pivoting against the product it stands for, in float64."""

import pytest
import torch

from optimum_mixrank.decomposition import pivot_rows


SHAPES = [(9, 6, 3), (6, 9, 5), (60, 36, 20), (36, 60, 35), (2, 5, 1), (40, 40, 39)]


def factors(m, n, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, n, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(m, rank, generator=generator, dtype=torch.float64).to(dtype),
    )


def others(pivots, m):
    return [row for row in range(m) if row not in set(pivots.tolist())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_product_is_unchanged(shape, dtype):
    m, n, rank = shape
    A, B = factors(*shape, dtype=dtype)
    pivoting = pivot_rows(A, B)
    product = B.double() @ A.double()
    rebuilt = torch.empty_like(product)
    rebuilt[pivoting.pivots] = pivoting.A
    rebuilt[others(pivoting.pivots, m)] = pivoting.C @ pivoting.A
    torch.testing.assert_close(rebuilt, product, rtol=1e-10, atol=1e-10)
    assert pivoting.A.numel() + pivoting.C.numel() == rank * (m + n) - rank**2
    assert pivoting.pivots.tolist() == sorted(set(pivoting.pivots.tolist()))


@pytest.mark.parametrize("seed", range(20))
def test_coefficients_are_small_and_of_no_smaller_volume_than_random_choices(seed):
    A, B = factors(48, 30, 16, seed)
    # Columns of very different scale and nearly equal rows: hard cases for a choice by size alone.
    B = B * torch.logspace(0, -6, 16, dtype=torch.float64)
    B[24:] = B[:24] * (1 + 1e-3 * torch.randn(24, 16, generator=torch.Generator().manual_seed(seed)).double())
    pivoting = pivot_rows(A, B)
    assert pivoting.growth <= 1.05
    volume = torch.linalg.slogdet(B[pivoting.pivots]).logabsdet
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        rows = torch.randperm(48, generator=generator)[:16]
        assert torch.linalg.slogdet(B[rows]).logabsdet <= volume + 1.0


def test_swaps_matter():
    A, B = factors(200, 30, 25, 3)
    assert pivot_rows(A, B, max_swaps=0).growth > 1.05
    assert pivot_rows(A, B).growth <= 1.05


@pytest.mark.parametrize("deficiency", ["dependent column", "zero column", "zero"])
def test_a_product_of_lower_rank(deficiency):
    A, B = factors(12, 8, 4)
    if deficiency == "dependent column":
        B[:, 3] = B[:, 0] - 2 * B[:, 1]
    elif deficiency == "zero column":
        B[:, 2] = 0
    else:
        B.zero_()
    pivoting = pivot_rows(A, B)
    rebuilt = torch.empty(12, 8, dtype=torch.float64)
    rebuilt[pivoting.pivots] = pivoting.A
    rebuilt[others(pivoting.pivots, 12)] = pivoting.C @ pivoting.A
    torch.testing.assert_close(rebuilt, B @ A, rtol=1e-9, atol=1e-9)
    assert pivoting.growth <= 1.05


def test_no_other_row():
    with pytest.raises(ValueError, match="rank 5 with 5 rows has no rows to combine"):
        pivot_rows(*factors(5, 9, 5))
