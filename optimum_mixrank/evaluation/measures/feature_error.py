"""The relative squared error of features."""

from __future__ import annotations

from torch import Tensor

from ...runtime.fidelity import mean_relative_error
from ...runtime.model_output import ModelOutput
from .measure import MEASURES, PairMeasure


@MEASURES.register
class FeatureError(PairMeasure):
    """`‖f - f_ref‖² / ‖f_ref‖²` of features, depth, heatmaps, embeddings or boxes."""

    name = "feature_error"
    label = "relative error of the features"
    kinds = ("features", "depth", "heatmaps", "embeddings", "detection")
    good, usable = 0.05, 0.2
    higher_is_better = False

    @classmethod
    def sentence(cls, value: float, images: str) -> str:
        """See `Measure.sentence`."""
        return f"a relative error of the output of {value:.2g} on {images}"

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`; infinite where all features of the original are zero."""
        return mean_relative_error(original.features, output.features)
