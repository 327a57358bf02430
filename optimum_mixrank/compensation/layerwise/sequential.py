"""Sequential, anchored closed form: every layer is solved again for the inputs that it gets in the compressed model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoint.factorize import factored_linear
from ...checkpoint.modeling import FactoredLinear
from ...checkpoint.names import Target
from ...decomposition import OutputFisher, anchored_weight
from ...runtime.precision import to_float64
from ..compensator import COMPENSATORS, CompensationTask
from .compensator import LayerwiseCompensator


@COMPENSATORS.register
class SequentialCompensator(LayerwiseCompensator):
    """Least squares towards the original model, then the best approximation of the layer's rank, both in closed form.

    See `decomposition.anchored`. The approximation weighs output errors by the Fisher information if the statistics
    contain it. Needs no learning rate, labels or random numbers.

    Args:
        ridge: Weight of the anchor, as a share of the mean variance of the inputs.
        damping: Share of the mean diagonal of the Fisher information that is added to its diagonal.
    """

    name = "sequential"
    description = "Solving in sequence"
    residual_targets = True

    def __init__(self, ridge: float = 0.03, damping: float = 0.03) -> None:
        self.ridge = ridge
        self.damping = damping

    def solve(
        self, task: CompensationTask, target: Target, input_moment: Tensor, target_moment: Tensor
    ) -> FactoredLinear:
        """See `LayerwiseCompensator.solve`."""
        entry = task.rank_map[target.canonical_name]
        weight = to_float64(target.module.weight)
        best = anchored_weight(weight, input_moment, target_moment, self.ridge)
        statistics = task.statistics.get(target.name)
        if statistics is not None and statistics.has_gradients:
            fisher = OutputFisher.of(weight, statistics, self.damping)
        else:
            fisher = OutputFisher(torch.eye(len(weight), dtype=weight.dtype, device=weight.device))
        A, B = fisher.decompose(best, input_moment).factors(entry.rank)
        return factored_linear(target.module, A, B, entry.layout)
