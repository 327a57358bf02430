"""Kinds of outputs, recognized by the names and shapes of what a model returns.

A kind says which tensors of an output are distributions, compared by KL at every place, and which are features, compared
by their values. Calibration, compensation and evaluation follow it. One more kind is one more class here, or elsewhere
with `KINDS.register`; those of others are asked first.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from .model_output import CLASSES, ModelOutput, binary
from .output_fields import field_of, tensors_in
from .registry import KINDS


EMBEDDINGS = "embeddings"
"""The kind of a vector per image."""


class OutputKind(ABC):
    """A kind of output.

    Attributes:
        name: The name in the registry and in reports.
    """

    name: ClassVar[str]

    @abstractmethod
    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """Return what to compare, or None if the output is of another kind.

        Args:
            output: The value that the model returned, or some of its fields by name.
            config: The model's configuration.
        """


def recognized(output: Any, config: Any) -> ModelOutput | None:
    """Return what to compare of an output whose kind is known; None for others, which are features."""
    for name in dict.fromkeys((*KINDS.added, *KINDS)):
        if (found := KINDS.create(name).select(output, config)) is not None:
            return found
    return None


def _tensor(output: Any, name: str, ndim: int | None = None) -> Tensor | None:
    value = field_of(output, name)
    is_one = isinstance(value, Tensor) and value.is_floating_point() and ndim in (None, value.ndim)
    return value if is_one else None


@KINDS.register
class SegmentsKind(OutputKind):
    """Queries with a class and a mask each: Mask2Former, MaskFormer, EoMT."""

    name = "segments"

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        classes, masks = (_tensor(output, f"{each}_queries_logits") for each in ("class", "masks"))
        if classes is None or masks is None:
            return None
        return ModelOutput(distributions=(classes, binary(masks)), kind=self.name)


@KINDS.register
class DetectionKind(OutputKind):
    """Boxes with classes: the last class of a softmax is that there is no object; other classes have a sigmoid each."""

    name = "detection"

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        logits, boxes, masks = (
            _tensor(output, "logits", 3),
            _tensor(output, "pred_boxes", 3),
            _tensor(output, "pred_masks"),
        )
        if logits is None or boxes is None or logits.shape[:2] != boxes.shape[:2]:
            return None
        # Classes that are named by text are as many as there are texts.
        exclusive = (
            field_of(output, "text_embeds") is None and logits.shape[-1] == getattr(config, "num_labels", 0) + 1
        )
        distributions = [logits if exclusive else binary(logits), *([] if masks is None else [binary(masks)])]
        return ModelOutput(distributions=distributions, features=(boxes,), kind=self.name)


@KINDS.register
class SegmentationKind(OutputKind):
    """A class for every pixel, `[images, classes, height, width]`."""

    name = "segmentation"

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        logits = _tensor(output, "logits", 4)
        if logits is None or logits.shape[1] != getattr(config, "num_labels", None) or logits.shape[1] < 2:
            return None
        return ModelOutput(distributions=(logits.movedim(1, -1),), kind=self.name)


@KINDS.register
class MasksKind(OutputKind):
    """Masks that do not exclude one another, with a sigmoid for every pixel: SAM, or one class alone."""

    name = "masks"

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        masks = _tensor(output, "pred_masks")
        logits = _tensor(output, "logits", 4)
        if masks is None and logits is not None and logits.shape[1] == getattr(config, "num_labels", None) == 1:
            masks = logits
        if masks is None or masks.ndim < 3:
            return None
        return ModelOutput(distributions=(binary(masks),), kind=self.name)


@KINDS.register
class TokensKind(OutputKind):
    """A distribution over the vocabulary at every place of one text or several, `[images, tokens, vocabulary]`."""

    name = "tokens"

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        logits = list(tensors_in(field_of(output, "logits")))
        sizes = set(_vocabularies(config))
        if not logits or not all(each.ndim == 3 and each.shape[-1] in sizes for each in logits):
            return None
        return ModelOutput(distributions=logits, kind=self.name)


def _vocabularies(config: Any, depth: int = 3) -> Iterator[int]:
    """Yield the sizes of all vocabularies in a configuration and in those of its parts."""
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if isinstance(value, int) and re.fullmatch(r"vocab_size|num_\w+_labels", name):
            yield value
        elif depth and name.endswith(("config", "coder")):
            yield from _vocabularies(value, depth - 1)


@KINDS.register
class ClassesKind(OutputKind):
    """One softmax over classes per image; some models keep a dimension of one entry for what they have pooled."""

    name = CLASSES

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        logits = _tensor(output, "logits")
        if logits is not None and logits.ndim == 3 and logits.shape[1:] == (1, getattr(config, "num_labels", None)):
            logits = logits.squeeze(1)
        if logits is None or logits.ndim != 2:
            return None
        # Classes that do not exclude one another have no common distribution.
        exclusive = getattr(config, "problem_type", None) not in ("multi_label_classification", "regression")
        return ModelOutput(logits=logits) if exclusive and logits.shape[1] > 1 else None


class _ValuesKind(OutputKind):
    """One tensor that is compared by its values.

    Attributes:
        field: Its name in the output.
    """

    field: ClassVar[str]

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        found = _tensor(output, self.field)
        return None if found is None or found.ndim < 2 else ModelOutput(features=(found,), kind=self.name)


@KINDS.register
class DepthKind(_ValuesKind):
    """A depth for every pixel."""

    name, field = "depth", "predicted_depth"


@KINDS.register
class HeatmapsKind(_ValuesKind):
    """A map for every keypoint."""

    name, field = "heatmaps", "heatmaps"


@KINDS.register
class EmbeddingsKind(OutputKind):
    """One vector per image, by which images are found: of models of images and texts, and of the tower for images."""

    name = EMBEDDINGS

    def select(self, output: Any, config: Any) -> ModelOutput | None:
        """See `OutputKind.select`."""
        found = _tensor(output, "image_embeds", 2)
        if found is None and (_is_tower(config) or field_of(output, "last_hidden_state") is None):
            found = _tensor(output, "pooler_output", 2)
        return None if found is None else ModelOutput(features=(found,), kind=self.name)


_TOWERS = {"align", "altclip", "aimv2", "chinese_clip", "clip", "groupvit", "metaclip_2", "siglip", "siglip2", "xclip"}
"""Towers of which the rest of the model sees the pooled output alone. BLIP and OWL-ViT read all patches."""


def _is_tower(config: Any) -> bool:
    """Return whether images are compared with texts by the pooled output of such a tower."""
    name = str(getattr(config, "model_type", "")).removesuffix("_vision_model")
    return name in _TOWERS and getattr(config, "base_config_key", "") == "vision_config"
