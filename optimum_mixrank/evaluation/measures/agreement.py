"""How often both models predict the same."""

from __future__ import annotations

from torch import Tensor

from ...runtime.fidelity import agreement
from ...runtime.model_output import ModelOutput
from .measure import MEASURES, PairMeasure, mean_over


@MEASURES.register
class Agreement(PairMeasure):
    """Share of images, or of the pixels or tokens of an image, for which both models find the same class likeliest.

    Where both were measured, top-1 fell by about one point at an agreement of 95 %, by two to four at 90 %, and by ten at
    80 %.
    """

    name = "agreement"
    label = "agreement with the original"
    kinds = ("classes", "tokens", "segmentation")
    form = ".2%"
    good, usable = 0.95, 0.85

    @classmethod
    def brief(cls, value: float) -> str:
        """See `Measure.brief`."""
        return f"agreement {cls.text(value)}"

    @classmethod
    def sentence(cls, value: float, images: str) -> str:
        """See `Measure.sentence`."""
        return f"the same class as the original on {value:.1%} of {images}"

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`."""
        if original.logits is not None and output.logits is not None:
            return agreement(original.logits, output.logits)
        pairs = zip(original.distributions, output.distributions, strict=True)
        return mean_over([(a.argmax(-1) == b.argmax(-1)).flatten(1).double().mean(dim=1) for a, b in pairs])
