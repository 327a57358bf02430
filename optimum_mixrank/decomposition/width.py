r"""Which hidden units of an MLP to keep, in closed form and for all widths at once.

Let `y = W h` be the second layer of an MLP with hidden units `h`, `H = Cov(h)`, and let `T = Cov(t, h)` be the covariance
of its targets with them (`W H` for the layer itself). If only the units J are kept and the layer is solved again for them,
`W' = T_J H_JJ⁻¹`, the error under the Fisher information `F = L Lᵀ` of the output is

    E(J) = ‖Lᵀ t‖² - tr(Lᵀ T_J H_JJ⁻¹ T_Jᵀ L).

The unit that lowers it most is found for one unit after the other (forward selection by orthogonal least squares): with the
residual covariance R, at first H, and `P = Lᵀ T`, at first, it is the unit j with the largest `‖P_j‖² / R_jj`; then
`R ← R - R_j R_jᵀ / R_jj` and `P ← P - P_j R_jᵀ / R_jj`. That is a Cholesky factorization of H whose pivots are chosen by
their use for the output. The non-linearity lies before the hidden units, so that no error of the first layer passes
through it.

With fewer tokens than units, H is singular: some combinations of units did not vary, by chance, and the second layer
could use any multiple of them. Therefore a share λ of its own variance is added to the variance of each unit, which
penalises `λ Σ_j H_jj ‖W'_j - W_j‖²`, where `W'_j` is zero for the units that go. It holds the second layer to its
original weights, whatever the scale of each unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


_TINY = torch.finfo(torch.float64).tiny

_NEGLIGIBLE = 1e-10
"""Share of a unit's variance below which what the kept units leave of it is taken for rounding errors."""


_PENALTY = 0.003
"""Share λ of its variance that is added to each unit's, for as many tokens as there are units.

It falls with the number of tokens: measured on a ViT-S with 1,536 units, 1 % is right for 520 tokens and too much for
2,080 (see `held_to_weights`).
"""


def held_to_weights(hidden_moment: Tensor, num_tokens: int) -> Tensor:
    """Return `H + λ diag(H)`, `[h, h]`, with `λ = 0.003 h / num_tokens`, so that few tokens do not decide alone.

    Args:
        hidden_moment: `H`, `[h, h]`, float64: covariance of the hidden units, or second moment for a layer without bias.
        num_tokens: Number of tokens that it was taken from.
    """
    share = _PENALTY * len(hidden_moment) / max(1, num_tokens)
    return hidden_moment + torch.diag(share * hidden_moment.diagonal())


@dataclass(frozen=True)
class UnitSelection:
    """Units in the order in which they are kept.

    Attributes:
        order: Indices of units, int64, `[units]`; fewer than there are if the others are combinations of these.
        directions: What each unit adds to the output, in coordinates in which its error is a plain sum of squares,
            `[outputs, units]`, float64: the columns of `Lᵀ T_J` in the basis of the Cholesky factor of `H_JJ`.
    """

    order: Tensor
    directions: Tensor

    @classmethod
    def none(cls) -> UnitSelection:
        """Return a selection without units."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.float64))

    def gains(self) -> Tensor:
        """Return by how much each unit lowers the error, `[units]`."""
        return self.directions.square().sum(dim=0)

    def explained(self, width: int) -> Tensor:
        """Return the second moment of the output that the first `width` units explain, `Lᵀ W' H_JJ W'ᵀ L`."""
        kept = self.directions[:, :width]
        return kept @ kept.T

    def filled(self, width: int, num_units: int) -> Tensor:
        """Return `width` of all units, ascending: the first of the order, and useless ones if there are not as many."""
        kept = self.order[:width]
        everything = torch.arange(num_units, device=kept.device)
        unused = everything[~torch.isin(everything, kept)]
        return torch.cat([kept, unused[: width - len(kept)]]).sort().values

    def kept(self, width: int) -> Tensor:
        """Return the first `width` units, ascending."""
        return self.order[:width].sort().values


def select_units(hidden_moment: Tensor, target_moment: Tensor, most: int | None = None) -> UnitSelection:
    """Select units one by one.

    Args:
        hidden_moment: `H`, `[h, h]`, float64: covariance of the hidden units, or second moment for a layer without bias.
        target_moment: `Lᵀ T`, `[m, h]`, float64, the same between the weighted targets and the units.
        most: The number of units to select; default: all that add anything.
    """
    size = len(hidden_moment)
    most = size if most is None else min(most, size)
    variances = hidden_moment.diagonal().clone()
    smallest = _NEGLIGIBLE * variances
    rows = hidden_moment.new_zeros(most, size)
    # One row per unit, so that both norms and products run along memory.
    left = target_moment.T.contiguous()
    order: list[int] = []
    directions = target_moment.new_zeros(most, len(target_moment))
    for step in range(most):
        scores = torch.linalg.vector_norm(left, dim=1).square_() / variances.clamp_min(_TINY)
        scores[variances <= smallest] = -1.0
        unit = int(scores.argmax())
        if scores[unit] < 0:
            break
        pivot = variances[unit].sqrt()
        # The next row of the Cholesky factor; those before it hold what the units kept so far explain.
        row = (hidden_moment[unit] - rows[:step, unit] @ rows[:step]) / pivot
        direction = left[unit] / pivot
        left.addr_(row, direction, alpha=-1)
        variances -= row.square()
        variances[unit] = 0.0
        rows[step], directions[step] = row, direction
        order.append(unit)
    return UnitSelection(torch.tensor(order, dtype=torch.int64, device=left.device), directions[: len(order)].T)


def solved_for_units(hidden_moment: Tensor, target_moment: Tensor, units: Tensor) -> Tensor:
    """Return `W' = T_J H_JJ⁻¹`, `[m, units]`, the second layer for the units J alone.

    Args:
        hidden_moment: `H`, `[h, h]`, float64.
        target_moment: `T`, `[m, h]`, float64.
        units: J, int64, `[units]`, as `select_units` returns it.
    """
    inner = hidden_moment[units][:, units]
    # Selected units differ by more than rounding errors, hence the factor exists but for these.
    penalty = _NEGLIGIBLE * inner.diagonal().mean()
    lower = torch.linalg.cholesky(inner + penalty * torch.eye(len(units), dtype=inner.dtype, device=inner.device))
    return torch.cholesky_solve(target_moment[:, units].T, lower).T
