"""Factored layers with random weights, and inputs for them."""

import torch

from optimum_mixrank import LowRankLinear, PivotedLinear
from optimum_mixrank.decomposition import pivot_rows


def low_rank(m=50, n=36, rank=7, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64) / n**0.5
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64) / rank**0.5
    b = torch.randn(m, generator=generator, dtype=torch.float64) if bias else None
    return LowRankLinear.from_factors(A.to(dtype), B.to(dtype), None if b is None else b.to(dtype))


def inputs(n=36, dtype=torch.float32, lead=(4, 5)):
    return torch.randn(*lead, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def pivoted(m=50, n=36, rank=7, bias=True, dtype=torch.float32, seed=0):
    layer = low_rank(m, n, rank, bias, torch.float64, seed)
    pivots, A, C = pivot_rows(layer.factor_a.weight.detach(), layer.factor_b.weight.detach())
    b = layer.bias.detach().to(dtype) if bias else None
    return layer, PivotedLinear.from_pivots(A.to(dtype), C.to(dtype), pivots, b)
