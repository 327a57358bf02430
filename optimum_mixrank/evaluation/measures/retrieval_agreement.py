"""Whether the same images are found to be similar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...runtime.model_output import ModelOutput
from .measure import MEASURES, Measure


MAX_IMAGES = 10_000
"""The first images of each process are compared; every one with every other takes long for more."""

_Embeddings = tuple[Tensor, Tensor]


@MEASURES.register
class RetrievalAgreement(Measure):
    """Share of images whose nearest neighbour among the others, by cosine similarity, is the same for both models.

    It depends on how many images are compared: the more there are, the closer is the second nearest to the nearest.
    """

    name = "retrieval_agreement"
    label = "same nearest image"
    kinds = ("embeddings",)
    form = ".2%"

    def __init__(self) -> None:
        self._pairs: list[_Embeddings] = []

    def add(self, original: ModelOutput, output: ModelOutput, num_images: int) -> None:
        """See `Measure.add`."""
        if sum(len(each) for each, _ in self._pairs) >= MAX_IMAGES:
            return
        self._pairs.append((original.features[0].float(), output.features[0].float()))

    def state(self) -> list[_Embeddings]:
        """See `Measure.state`."""
        return self._pairs

    @classmethod
    def result(cls, states: Sequence[list[_Embeddings]]) -> float | None:
        """See `Measure.result`; with fewer than three images there is nothing to choose from."""
        pairs = [pair for state in states for pair in state]
        if sum(len(original) for original, _ in pairs) < 3:
            return None
        original, compressed = (
            functional.normalize(torch.cat(list(each)).double()) for each in zip(*pairs, strict=True)
        )
        return (_nearest(original) == _nearest(compressed)).double().mean().item()


def _nearest(embeddings: Tensor, rows: int = 1024) -> Tensor:
    """Return the number of the nearest other row of each row, `[images]`."""
    found = []
    for start in range(0, len(embeddings), rows):
        similarity = embeddings[start : start + rows] @ embeddings.T
        own = torch.arange(len(similarity))
        similarity[own, own + start] = -torch.inf
        found.append(similarity.argmax(dim=1))
    return torch.cat(found)
