"""Whether embeddings point in the same direction."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ...runtime.model_output import ModelOutput
from ...runtime.precision import to_float64
from .measure import MEASURES, PairMeasure, mean_over


@MEASURES.register
class CosineSimilarity(PairMeasure):
    """The cosine of the angle between the embeddings of both models for an image; 1 for equal ones."""

    name = "cosine_similarity"
    label = "cosine similarity"
    kinds = ("embeddings",)
    form = ".4f"
    good, usable = 0.975, 0.9

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`."""
        pairs = zip(original.features, output.features, strict=True)
        return mean_over([functional.cosine_similarity(to_float64(a), to_float64(b), dim=-1) for a, b in pairs])
