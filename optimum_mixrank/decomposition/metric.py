"""The interface of metrics, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..runtime import registry
from .factorization import Decomposition
from .statistics import GRADIENT_STATISTICS, LayerStatistics, Statistic


class Metric(ABC):
    """A measure of a layer's error, under which the layer is decomposed.

    Attributes:
        name: The value of `MixRankConfig.metric` that selects it.
        uses_data: Whether calibration images are needed. If so, the mean of the error does not count, since the bias
            absorbs it (`corrected_bias`); layers without bias have statistics about zero instead.
        common_unit: Whether the energies of different layers may be added up as they are. If not, the energies of each
            layer are divided by their total before ranks are allocated, as in the paper.
    """

    name: ClassVar[str]
    uses_data: ClassVar[bool] = True
    common_unit: ClassVar[bool] = False

    @property
    def uses_gradients(self) -> bool:
        """Whether calibration needs gradients: one backward pass per sampled label."""
        return bool(self.required_statistics(2, 2) & GRADIENT_STATISTICS)

    @abstractmethod
    def required_statistics(self, out_features: int, in_features: int) -> frozenset[Statistic]:
        """Return the statistics that `decompose` needs for a layer of this shape."""

    @abstractmethod
    def decompose(self, weight: Tensor, statistics: LayerStatistics | None) -> Decomposition:
        """Return the best approximations of all ranks.

        Args:
            weight: `[out_features, in_features]`, float64.
            statistics: The required statistics; None for a metric without data.
        """


METRICS: registry.Registry[Metric] = registry.METRICS
