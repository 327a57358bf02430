"""What a calibration run found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..decomposition.statistics import LayerStatistics


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers, with what they were taken from.

    Attributes:
        layers: Statistics by module name.
        num_images: Images that were seen.
        broken: Names of the files that could not be decoded and were left out.
        seconds: Wall time of the run.
    """

    layers: Mapping[str, LayerStatistics]
    num_images: int
    broken: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the layer with the most of them has seen."""
        return max((statistics.num_tokens for statistics in self.layers.values()), default=0)
