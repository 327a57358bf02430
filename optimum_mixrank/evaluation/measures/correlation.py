"""Whether features rise and fall together."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.model_output import ModelOutput
from ...runtime.precision import to_float64
from .measure import MEASURES, PairMeasure, mean_over


@MEASURES.register
class Correlation(PairMeasure):
    """Pearson's correlation between the values of both models, within each image; 1 for equal ones.

    It does not apply to a single value per image, as that of a head for regression.
    """

    name = "correlation"
    label = "correlation with the original"
    kinds = ("features", "depth", "heatmaps")
    form = ".4f"

    def add(self, original: ModelOutput, output: ModelOutput, num_images: int) -> None:
        """See `Measure.add`."""
        if any(each[:1].numel() > 1 for each in original.features):
            super().add(original, output, num_images)

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`."""
        pairs = zip(original.features, output.features, strict=True)
        return mean_over([_correlation(a, b) for a, b in pairs if a[:1].numel() > 1])


def _correlation(reference: Tensor, values: Tensor) -> Tensor:
    a, b = (to_float64(each).flatten(1) for each in (reference, values))
    a, b = (each - each.mean(dim=1, keepdim=True) for each in (a, b))
    product, size = (a * b).sum(dim=1), a.norm(dim=1) * b.norm(dim=1)
    # A single value or a constant map varies with nothing; equal ones correlate fully.
    equal = (to_float64(reference) == to_float64(values)).flatten(1).all(dim=1)
    return torch.where(size > 0, (product / size).clamp(-1, 1), torch.where(equal, 1.0, 0.0).to(product))
