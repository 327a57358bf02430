"""The effect of a layer's error on the prediction: the two-sided metric."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .factorization import Decomposition
from .metric import METRICS, Metric
from .statistics import LayerStatistics, Statistic
from .two_sided import OutputFisher


@METRICS.register
class KfacMetric(Metric):
    """Predicted loss, `½ tokens · tr(F ΔW Σ ΔWᵀ)`, in nats per image (K-FAC, arXiv 1503.05671).

    `F = E[g gᵀ]` is the Fisher information of the layer's output: `g` is the gradient of the log-likelihood of labels
    drawn from the model itself, so that no true labels are needed. All layers are measured in the same unit.

    Memory: two float64 matrices of the smaller side per layer, one of them shared by layers that share an input.
    `damping` is the share of the mean diagonal of `F` that is added to its diagonal.
    """

    name = "kfac"
    common_unit = True

    def __init__(self, damping: float = 0.01) -> None:
        self.damping = damping

    def required_statistics(self, out_features: int, in_features: int) -> frozenset[Statistic]:
        """Return the mean of the inputs, the covariance of the smaller side and the second moment of its gradients.

        The covariance of the inputs may always take the place of that of the outputs.
        """
        smaller = Statistic.OUTPUT_COVARIANCE if out_features < in_features else Statistic.INPUT_COVARIANCE
        gradients = {Statistic.GRADIENT_MOMENT}
        if out_features > in_features:
            gradients = {Statistic.INPUT_GRADIENT_MOMENT, Statistic.GRADIENT_ENERGY}
        return frozenset({Statistic.INPUT_MEAN, smaller, *gradients})

    def decompose(self, weight: Tensor, statistics: LayerStatistics | None) -> Decomposition:
        """See `Metric.decompose`."""
        statistics = statistics or LayerStatistics(0)
        fisher = OutputFisher.of(weight, statistics, self.damping)
        if weight.shape[0] < weight.shape[1] and statistics.output_covariance is not None:
            found = fisher.decompose(weight, output_covariance=statistics.require(Statistic.OUTPUT_COVARIANCE))
        else:
            found = fisher.decompose(weight, statistics.require(Statistic.INPUT_COVARIANCE))
        # If the prediction does not depend on the layer, it loses nothing at any rank.
        matters = bool(statistics.total_gradient_energy > 0)
        return dataclasses.replace(found, energies=found.energies * (statistics.tokens_per_image / 2 * matters))
