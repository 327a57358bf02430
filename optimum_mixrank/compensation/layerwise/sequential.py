"""Sequential, anchored closed form: every layer is solved again for the inputs that it gets in the compressed model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checkpoint.factorize import factored_linear
from ...checkpoint.modeling import FactoredLinear
from ...checkpoint.narrowing import linear_like
from ...decomposition import OutputFisher, anchored_weight
from ...decomposition.two_sided import lower_root
from ...decomposition.width import select_units
from ...runtime.precision import to_float64
from ..compensator import COMPENSATORS, CompensationTask
from .compensator import LayerwiseCompensator
from .places import Place


@COMPENSATORS.register
class SequentialCompensator(LayerwiseCompensator):
    """Least squares towards the original model, then the best approximation of the layer's rank, both in closed form.

    See `decomposition.anchored`. The approximation weighs output errors by the Fisher information if the statistics
    contain it. Needs no learning rate, labels or random numbers.

    Args:
        ridge: Weight of the anchor, as a share of the typical variance of the inputs; see `typical_scale`.
        damping: Share of the mean diagonal of the Fisher information that is added to its diagonal.
    """

    name = "sequential"
    description = "Solving in sequence"
    residual_targets = True
    chooses_units = True
    closed_form = True

    def __init__(self, ridge: float = 0.03, damping: float = 0.03) -> None:
        self.ridge = ridge
        self.damping = damping

    def solve(
        self, task: CompensationTask, place: Place, input_moment: Tensor, target_moment: Tensor
    ) -> FactoredLinear | nn.Linear:
        """See `LayerwiseCompensator.solve`."""
        module = place.target.module
        weight = to_float64(module.weight)
        best = anchored_weight(weight, input_moment, target_moment, self.ridge)
        if place.rank is None:
            return linear_like(module, best, module.bias)
        A, B = self._fisher(place).decompose(best, input_moment).factors(place.rank)
        return factored_linear(module, A, B, place.layout)

    def choose_units(self, place: Place, hidden_moment: Tensor, target_moment: Tensor) -> Tensor:
        """See `LayerwiseCompensator.choose_units`; those that the targets need most, under the Fisher information."""
        root = lower_root(self._fisher(place).moment)
        selection = select_units(hidden_moment, root.T @ target_moment, place.width)
        return selection.filled(place.width, len(hidden_moment))

    def _fisher(self, place: Place) -> OutputFisher:
        weight, statistics = to_float64(place.target.module.weight), place.statistics
        if statistics is not None and statistics.has_gradients:
            return OutputFisher.of(weight, statistics, self.damping)
        return OutputFisher(torch.eye(len(weight), dtype=weight.dtype, device=weight.device))
