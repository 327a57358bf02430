r"""Closed-form repair of a layer whose inputs have changed.

Let a layer see inputs `x'`, since the layers before it are compressed, while its output should be `t`. The weight that
minimises `E ‖t - W* x' - b*‖² + λ ‖W* - W‖²` is

    W* = (S_t + λ W) (S + λ I)⁻¹,   S = Cov(x'),   S_t = Cov(t, x'),   b* = E[t] - W* E[x'],

anchored to the original weight `W` where the data say little. What `W*` leaves of `t` is uncorrelated with `x'` up to
`λ`, so that errors add up: the best rank-r approximation `Ŵ` under `tr(F (W* - Ŵ) S (W* - Ŵ)ᵀ)` follows as in `two_sided`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .damping import typical_scale


_TINY = torch.finfo(torch.float32).tiny
"""Variance of inputs from which on rounding is all that it holds: their products are made in float32."""


def anchored_weight(weight: Tensor, input_moment: Tensor, target_moment: Tensor, ridge: float) -> Tensor:
    """Return the ridge regression weight `W*`, `[m, n]`, float64; `W` itself if the inputs do not vary noticeably.

    Args:
        weight: `W`, `[m, n]`, float64, to which the solution is anchored.
        input_moment: `S`, `[n, n]`, float64: covariance of the inputs, or second moment for a layer without bias.
        target_moment: `S_t`, `[m, n]`, float64: the same between targets and inputs.
        ridge: `λ` as a multiple of the `typical_scale` of `S`, above 0.
    """
    scale = typical_scale(input_moment.diagonal())
    if scale <= _TINY:
        return weight
    penalty = ridge * scale
    regularised = input_moment + penalty * torch.eye(len(input_moment), dtype=weight.dtype, device=weight.device)
    right = (target_moment + penalty * weight).T
    lower, failed = torch.linalg.cholesky_ex(regularised)
    if not failed:
        return torch.cholesky_solve(right, lower).T
    # Rounding has left variances below zero, as of inputs that hardly vary around large means.
    values, vectors = torch.linalg.eigh(input_moment)
    return (right.T @ vectors / (values.clamp_min(0) + penalty)) @ vectors.T
