"""What a metric is, and the registry of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..runtime import registry
from ..runtime.registry import Registry
from .factorization import Decomposition
from .statistics import GRADIENT_STATISTICS, LayerStatistics, Statistic


class Metric(ABC):
    """A measure of a layer's error, under which it is decomposed.

    Attributes:
        name: Value of `MixRankConfig.metric`.
        uses_data: Whether calibration images are needed. If so, the metric is centred: the mean of the error is not
            counted, since the bias absorbs it (`corrected_bias`); a layer without bias gives statistics about zero.
        common_unit: Whether the energies of different layers can be added up as they are. If not, every layer's energy
            is normalised by its total before ranks are allocated, as in the paper.
    """

    name: ClassVar[str]
    uses_data: ClassVar[bool] = True
    common_unit: ClassVar[bool] = False

    @property
    def uses_gradients(self) -> bool:
        """Whether calibration has to take gradients, with a backward pass per probe."""
        return bool(self.required_statistics(2, 2) & GRADIENT_STATISTICS)

    @abstractmethod
    def required_statistics(self, out_features: int, in_features: int) -> frozenset[Statistic]:
        """The statistics that `decompose` needs for a layer of this shape."""

    @abstractmethod
    def decompose(self, weight: Tensor, statistics: LayerStatistics | None) -> Decomposition:
        """Best approximations of all ranks.

        Args:
            weight: `[out_features, in_features]`, float64.
            statistics: What `required_statistics` asked for; None for a metric without data.
        """


METRICS: Registry[Metric] = registry.METRICS
