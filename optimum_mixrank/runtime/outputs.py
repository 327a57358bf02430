"""What a model says, whatever its head: logits of one softmax, or features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """What a model says about a batch.

    Attributes:
        logits: `[batch, classes]`, of one softmax; None for other heads.
        features: Tensors `[batch, ...]`; empty if there are logits.
    """

    logits: Tensor | None = None
    features: Sequence[Tensor] = ()

    def cpu(self) -> ModelOutput:
        """The same on the CPU."""
        return ModelOutput(
            None if self.logits is None else self.logits.cpu(), tuple(feature.cpu() for feature in self.features)
        )


def select_output(output: Any, config: Any) -> ModelOutput:
    """Take logits or features out of whatever a model returns.

    Models with one softmax over classes give logits; all others (encoders, backbones, dense, multi-label or regression
    heads) give feature maps, else the last hidden state, else what the head gives.

    Args:
        output: What the model returned.
        config: The model's configuration; its `problem_type` says whether labels exclude one another.

    Raises:
        ValueError: if there is nothing to take.
    """
    logits = _field(output, "logits")
    # Labels that do not exclude one another have no common distribution.
    exclusive = getattr(config, "problem_type", None) not in ("multi_label_classification", "regression")
    if exclusive and logits is not None and logits.ndim == 2 and logits.shape[1] > 1:
        return ModelOutput(logits=logits)
    for name in ("feature_maps", "last_hidden_state", "logits", "reconstruction", "pooler_output"):
        features = _field(output, name)
        if features is not None:
            break
    else:
        features = output
    if isinstance(features, Tensor):
        features = (features,)
    if not isinstance(features, list | tuple) or not features or not all(isinstance(f, Tensor) for f in features):
        raise ValueError(
            f"A {type(output).__name__} holds neither logits nor features (`feature_maps`, `last_hidden_state`, "
            "`pooler_output`); evaluate a model for image classification, an encoder or a backbone."
        )
    return ModelOutput(features=tuple(features))


def _field(output: Any, name: str) -> Any:
    # Transformers' outputs are mappings too. As attributes, some have deprecated names that warn.
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
