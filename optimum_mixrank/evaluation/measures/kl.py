"""How far the predicted distributions are apart."""

from __future__ import annotations

from torch import Tensor

from ...runtime.fidelity import kl_divergence, mean_kl_divergence
from ...runtime.model_output import ModelOutput
from .measure import MEASURES, PairMeasure


@MEASURES.register
class Divergence(PairMeasure):
    """KL(original ‖ compressed) in nats: of the classes of an image, or the mean over its pixels, tokens or boxes."""

    name = "kl"
    label = "KL(original || compressed)"
    title = "KL from the original"
    kinds = ("classes", "tokens", "segmentation", "masks", "segments", "detection")
    form = ".4f"
    unit = " nats"
    higher_is_better = False

    @classmethod
    def brief(cls, value: float) -> str:
        """See `Measure.brief`."""
        return f"KL {value:.3g} nats"

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`."""
        if original.logits is not None and output.logits is not None:
            return kl_divergence(original.logits, output.logits)
        return mean_kl_divergence(original.distributions, output.distributions)
