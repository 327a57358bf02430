"""Plain truncated SVD of the weight, without data."""

from __future__ import annotations

import torch
from torch import Tensor

from .factorization import Decomposition
from .metric import METRICS, Metric
from .statistics import LayerStatistics, Statistic


@METRICS.register
class SvdMetric(Metric):
    """Error of the weight itself, `‖W - Ŵ‖²_F` (Eckart and Young, 1936)."""

    name = "svd"
    uses_data = False

    def required_statistics(self, out_features: int, in_features: int) -> frozenset[Statistic]:
        """Return the empty set: no statistics are needed."""
        return frozenset()

    def decompose(self, weight: Tensor, statistics: LayerStatistics | None) -> Decomposition:
        """See `Metric.decompose`."""
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return Decomposition(U, S[:, None] * Vh, S.square())
