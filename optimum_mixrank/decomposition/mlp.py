r"""An MLP under the two-sided measure: fewer hidden units, and factors of what stays.

The first layer `W₁`, `[c h, n]`, feeds `h` hidden units (`c = 2` where each is a product of a gate and a value, as in
SwiGLU: rows `j` and `j + h`), the second `W₂`, `[m, h]`, writes the output. The predicted loss of width s and ranks `r₁`,
`r₂` is a sum, in nats per image:

    what the units beyond s explain of the output (see `width`)
    + the tail of `W₁[J]` beyond `r₁` under `F₁[J, J]` and the covariance of the inputs
    + the tail of `W₂'` beyond `r₂` under `F₂` and `H_JJ`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .factorization import Decomposition
from .statistics import LayerStatistics, Statistic
from .two_sided import OutputFisher, damped, lower_root
from .width import UnitSelection, held_to_weights, select_units, solved_for_units


@dataclass(frozen=True)
class WidthLosses:
    """Losses of an MLP at one width, to be added up.

    Attributes:
        width: Hidden units kept, s.
        width_loss: Loss of the other units.
        first: Tails of the first layer at rank 0, 1, …, `[min(c s, n) + 1]`, float64, on the host.
        second: Tails of the second layer, `[min(m, s) + 1]`.
    """

    width: int
    width_loss: float
    first: Tensor
    second: Tensor

    @classmethod
    def zero(cls, width: int, first_shape: tuple[int, int], second_shape: tuple[int, int]) -> WidthLosses:
        """Return the losses of layers of these shapes before any data is seen."""
        first, second = (torch.zeros(min(shape) + 1, dtype=torch.float64) for shape in (first_shape, second_shape))
        return cls(width, 0.0, first, second)

    def scaled(self, factor: float) -> WidthLosses:
        """Return the losses multiplied by a factor."""
        return WidthLosses(self.width, self.width_loss * factor, self.first * factor, self.second * factor)


@dataclass(frozen=True)
class TwoSidedMlp:
    """Weights and statistics of an MLP, in float64.

    Attributes:
        first_weight: `W₁`, `[c h, n]`.
        second_weight: `W₂`, `[m, h]`.
        input_covariance: `[n, n]`.
        hidden_covariance: `H`, `[h, h]`, with the penalty of `width.held_to_weights`.
        first_fisher: `F₁`, damped, `[c h, c h]`: Fisher information of the outputs of the first layer.
        second_fisher: `F₂`, damped, `[m, m]`.
        first_scale: Factor that turns errors of the first layer into nats per image: half the tokens per image; 0 if the
            prediction does not depend on it.
        second_scale: The same for the second layer.
        selection: The units in the order in which they are kept; see `selected`.
    """

    first_weight: Tensor
    second_weight: Tensor
    input_covariance: Tensor
    hidden_covariance: Tensor
    first_fisher: Tensor
    second_fisher: Tensor
    first_scale: float = 1.0
    second_scale: float = 1.0
    selection: UnitSelection = field(default_factory=UnitSelection.none)

    @classmethod
    def of(
        cls, weights: tuple[Tensor, Tensor], statistics: tuple[LayerStatistics, LayerStatistics], damping: float
    ) -> TwoSidedMlp:
        """Take weights, float64, and statistics of the first and the second layer.

        `damping` is the share of the mean diagonal of a Fisher information that is added to its diagonal.

        Raises:
            ValueError: if a statistic was not collected.
        """
        moments = [each.require(Statistic.GRADIENT_MOMENT) for each in statistics]
        scales = [
            each.tokens_per_image / 2 * float(moment.trace() > 0)
            for each, moment in zip(statistics, moments, strict=True)
        ]
        return cls(
            *weights,
            statistics[0].require(Statistic.INPUT_COVARIANCE),
            held_to_weights(statistics[1].require(Statistic.INPUT_COVARIANCE), statistics[1].num_tokens),
            damped(moments[0], damping),
            damped(moments[1], damping),
            first_scale=scales[0],
            second_scale=scales[1],
        )

    @property
    def num_units(self) -> int:
        """Number of hidden units, `h`."""
        return self.second_weight.shape[1]

    def to(self, device: torch.device | str) -> TwoSidedMlp:
        """Return a copy on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        selection = UnitSelection(self.selection.order.to(device), self.selection.directions.to(device))
        return replace(self, selection=selection, **moved)

    def selected(self) -> TwoSidedMlp:
        """Return the same with the units selected, as all that follows requires."""
        root = lower_root(self.second_fisher)
        target_moment = root.T @ (self.second_weight @ self.hidden_covariance)
        return replace(self, selection=select_units(self.hidden_covariance, target_moment))

    def losses(self, widths: Sequence[int]) -> list[WidthLosses]:
        """Return the losses at given widths, ascending, of which none may exceed the number of hidden units."""
        root = lower_root(self.second_fisher)
        output = root.T @ self.second_weight @ self.hidden_covariance @ self.second_weight.T @ root
        total = float(output.trace())
        gains = torch.cat([self.selection.gains().new_zeros(1), self.selection.gains().cumsum(0)]).cpu()
        found = []
        for width, moment in zip(widths, self._first_moments(widths), strict=True):
            kept = min(width, len(gains) - 1)
            rest = max(0.0, total - float(gains[kept])) if width < self.num_units else 0.0
            explained = self.selection.explained(kept) if width < self.num_units else output
            first = _tails(moment, min(len(self.first_weight) // self.num_units * width, len(moment)))
            second = _tails(explained, min(len(output), width))
            found.append(
                WidthLosses(width, rest * self.second_scale, first * self.first_scale, second * self.second_scale)
            )
        return found

    def units(self, width: int) -> Tensor:
        """Return the units that are kept at a width, ascending; all if none has to go."""
        return self.selection.filled(width, self.num_units)

    def narrowed_second(self, units: Tensor) -> Tensor:
        """Return the second layer for some of the units, `W₂'`, `[m, units]`."""
        if len(units) == self.num_units:
            return self.second_weight
        selected = self.selection.order[torch.isin(self.selection.order, units)]
        weight = self.second_weight.new_zeros(len(self.second_weight), len(units))
        cross = self.second_weight @ self.hidden_covariance
        weight[:, torch.searchsorted(units, selected)] = solved_for_units(self.hidden_covariance, cross, selected)
        return weight

    def first_decomposition(self, units: Tensor) -> Decomposition:
        """Decompose the rows of the first layer that feed some of the units."""
        rows = rows_of_units(units, len(self.first_weight), self.num_units)
        return OutputFisher(self.first_fisher[rows][:, rows]).decompose(self.first_weight[rows], self.input_covariance)

    def second_decomposition(self, units: Tensor) -> Decomposition:
        """Decompose the second layer for some of the units."""
        hidden = self.hidden_covariance[units][:, units]
        return OutputFisher(self.second_fisher).decompose(self.narrowed_second(units), hidden)

    def _first_moments(self, widths: Sequence[int]) -> Iterator[Tensor]:
        """Return `Rᵀ W₁[J]ᵀ F₁[J, J] W₁[J] R`, `[n, n]`, for ascending widths; `R Rᵀ` is the covariance of the inputs."""
        jitter = _JITTER * self.input_covariance.diagonal().mean()
        scaled = self.first_weight @ lower_root(self.input_covariance + jitter * _eye(self.input_covariance))
        moment = scaled.new_zeros(scaled.shape[1], scaled.shape[1])
        kept = torch.zeros(0, dtype=torch.int64, device=scaled.device)
        for width in widths:
            units = self.units(width)
            added = units[~torch.isin(units, kept)]
            old, new = (rows_of_units(each, len(scaled), self.num_units) for each in (kept, added))
            # Every product of two rows is added once, so that all widths together cost as much as the largest.
            own = scaled[new].T @ self.first_fisher[new][:, new] @ scaled[new]
            cross = scaled[old].T @ (self.first_fisher[old][:, new] @ scaled[new])
            moment = moment + own + cross + cross.T
            kept = units
            yield moment


_JITTER = 1e-12
"""Share of the mean variance that is added to all variances, so that a covariance has a Cholesky factor."""


def rows_of_units(units: Tensor, num_rows: int, num_units: int) -> Tensor:
    """Return the rows of a first layer that feed some units: one or, where gates and values are stacked, two for each."""
    return torch.cat([units + start for start in range(0, num_rows, num_units)])


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _tails(moment: Tensor, size: int) -> Tensor:
    """Return the sums of all but the largest 0, 1, … eigenvalues of a positive semidefinite matrix, `[size + 1]`.

    They only serve to compare structures: in float32, eigenvalues take a fifth of the time.
    """
    # Gradients may be so small that their products leave the range of float32.
    # Of a moment that rounding has left indefinite, single entries may be larger than the trace.
    scale = torch.maximum(moment.diagonal().sum(), moment.abs().max()).clamp_min(torch.finfo(moment.dtype).tiny)
    energies = torch.linalg.eigvalsh((moment / scale).float()).to(moment).clamp_min(0).flip(0)[:size] * scale
    tails = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return torch.nn.functional.pad(tails, (0, size + 1 - len(tails))).cpu()
