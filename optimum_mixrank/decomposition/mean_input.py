"""The paper's representative input: calibration data condensed into one mean image."""

from __future__ import annotations

from torch import Tensor

from .factorization import Decomposition, decompose_by_input
from .metric import METRICS, Metric
from .statistics import LayerStatistics, Statistic


@METRICS.register
class MeanInputMetric(Metric):
    """Output error on the representative input `X̄`, `‖(W - Ŵ)(X̄ - μ)ᵀ‖²_F / tokens` (arXiv 2402.06004).

    `X̄`, `[tokens, in_features]`, is the mean of the layer's inputs over images. It spans at most as many directions as
    there are tokens; in all others the weight itself is approximated. The paper has no `μ`: here a layer's bias absorbs the
    mean of its error, so that no rank is spent on it. A layer without bias is decomposed on `X̄` itself, as in the paper.
    """

    name = "mean_input"

    def required_statistics(self, out_features: int, in_features: int) -> frozenset[Statistic]:
        """Return the mean of the inputs and the representative input."""
        return frozenset({Statistic.INPUT_MEAN, Statistic.REPRESENTATIVE_INPUT})

    def decompose(self, weight: Tensor, statistics: LayerStatistics | None) -> Decomposition:
        """See `Metric.decompose`."""
        statistics = statistics or LayerStatistics(0)
        inputs = statistics.require(Statistic.REPRESENTATIVE_INPUT)
        centred = inputs - inputs.mean(dim=0) if statistics.centred else inputs
        return decompose_by_input(weight, centred.T / len(inputs) ** 0.5)
