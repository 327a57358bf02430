"""What is compared of the output of a model: distributions of classes, and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


CLASSES, FEATURES = "classes", "features"
"""The kinds of outputs that need no rule of their own; `kinds` has the others."""


@dataclass(frozen=True)
class ModelOutput:
    """The output of a model for a batch.

    Attributes:
        logits: `[batch, classes]`, of one softmax per image; None for other heads.
        features: Tensors `[batch, ...]`, which are compared by their values.
        distributions: Logits of a softmax over the last dimension at every place, `[batch, ..., classes]`: of tokens,
            pixels or boxes. Classes that do not exclude one another are distributions of two classes each, see `binary`.
        kind: What it is, see `kinds`; by default classes where there are logits, else features.
    """

    logits: Tensor | None = None
    features: Sequence[Tensor] = ()
    distributions: Sequence[Tensor] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", FEATURES if self.logits is None else CLASSES)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is compared."""
        return (*(() if self.logits is None else (self.logits,)), *self.distributions, *self.features)

    def cpu(self) -> ModelOutput:
        """Return a copy on the CPU."""
        return ModelOutput(
            None if self.logits is None else self.logits.cpu(),
            tuple(feature.cpu() for feature in self.features),
            tuple(each.cpu() for each in self.distributions),
            self.kind,
        )


def binary(logits: Tensor) -> Tensor:
    """Return logits of a sigmoid, `[...]`, as those of a softmax over yes and no, `[..., 2]`."""
    # What is masked with minus infinity has no part in any sum.
    limited = logits.clamp(-1e4, 1e4)
    return torch.stack([limited, torch.zeros_like(limited)], dim=-1)
