"""What to compare of a model's output, whatever its head: the logits of one softmax, or features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """The output of a model for a batch.

    Attributes:
        logits: `[batch, classes]`, of one softmax; None for other heads.
        features: Tensors `[batch, ...]`; empty if there are logits.
    """

    logits: Tensor | None = None
    features: Sequence[Tensor] = ()

    def cpu(self) -> ModelOutput:
        """Return a copy on the CPU."""
        return ModelOutput(
            None if self.logits is None else self.logits.cpu(), tuple(feature.cpu() for feature in self.features)
        )


def select_output(output: Any, config: Any) -> ModelOutput:
    """Select logits or features from whatever a model returns.

    Models with one softmax over classes give logits. All others (encoders, backbones, dense, multi-label or regression
    heads) give feature maps, or else the last hidden state, or else the output of the head.

    Args:
        output: The value that the model returned.
        config: The model's configuration; its `problem_type` says whether classes exclude one another.

    Raises:
        ValueError: if the output holds neither.
    """
    logits = _field(output, "logits")
    # Classes that do not exclude one another have no common distribution.
    exclusive = getattr(config, "problem_type", None) not in ("multi_label_classification", "regression")
    if exclusive and logits is not None and logits.ndim == 2 and logits.shape[1] > 1:
        return ModelOutput(logits=logits)
    names = ("feature_maps", "last_hidden_state", "logits", "reconstruction", "pooler_output")
    features = next((found for name in names if (found := _field(output, name)) is not None), output)
    if isinstance(features, Tensor):
        features = (features,)
    if not isinstance(features, list | tuple) or not features or not all(isinstance(f, Tensor) for f in features):
        raise ValueError(
            f"A {type(output).__name__} holds neither logits nor features (`feature_maps`, `last_hidden_state`, "
            "`pooler_output`); use a model for image classification, an encoder or a backbone."
        )
    return ModelOutput(features=tuple(features))


def _field(output: Any, name: str) -> Any:
    # Transformers' outputs are mappings as well as objects; some attributes are deprecated names that warn when read.
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
