"""The output error if input features were uncorrelated (diagonal scaling as in ASVD)."""

from __future__ import annotations

import torch
from torch import Tensor

from .factorization import Decomposition, decompose_by_input
from .metric import METRICS, Metric
from .statistics import LayerStatistics, Statistic


@METRICS.register
class DiagonalMetric(Metric):
    """Output error if input features were uncorrelated, `‖(W - Ŵ) diag(σ)‖²_F`.

    `σ` is the standard deviation of each input feature. ASVD (arXiv 2312.05821) scales by a power of the mean
    absolute value instead; the standard deviation is what remains once the bias has absorbed the mean.
    """

    name = "diagonal"

    def required_statistics(self, out_features: int, in_features: int) -> frozenset[Statistic]:
        """Return the mean and variance of the inputs."""
        return frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_VARIANCE})

    def decompose(self, weight: Tensor, statistics: LayerStatistics | None) -> Decomposition:
        """See `Metric.decompose`."""
        statistics = statistics or LayerStatistics(0)
        return decompose_by_input(weight, torch.diag(statistics.require(Statistic.INPUT_VARIANCE).sqrt()))
