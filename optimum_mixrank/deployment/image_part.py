"""What of a model is exported: all of it or, of a model for images and text, what it sees of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..runtime.formatting import format_size
from ..runtime.forward import black_image, configured_shape, evaluation_mode
from ..runtime.inputs import ModelInputs
from ..runtime.output_fields import field_of
from ..runtime.outputs import ModelCall
from ..runtime.parts import FEATURES, WHOLE, is_features, part_of, possible_parts, takes


EMBEDDINGS, FEATURE_MAP = "image_embeds", "image_features"
"""Names of the only output of such a part: one vector per image, or one per token."""


class ImagePart(nn.Module):
    """`get_image_features` of a model as a model of its own: `pixel_values` in, a tensor by name out.

    Args:
        model: A model for images and text.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = getattr(model, "config", None)

    def forward(self, pixel_values: Tensor) -> Mapping[str, Tensor]:
        """Return `image_embeds`, `[images, width]`, or `image_features`, `[images, tokens, width]`."""
        output = part_of(self.model, FEATURES[0])(pixel_values=pixel_values)
        for name in (None, "pooler_output", "image_embeds"):
            value = output if name is None else field_of(output, name)
            if isinstance(value, Tensor):
                return {EMBEDDINGS if value.ndim == 2 else FEATURE_MAP: value}
        raise ValueError(f"`{FEATURES[0]}` returns no tensor for a batch of images of one size.")


def image_shape(
    model: nn.Module, image_processor: Any = None, pixel_values_shape: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the shape of the images that a file is for, `(channels, height, width)`.

    Args:
        model: The model.
        image_processor: Its image processor, which says what the configuration of the model may leave open.
        pixel_values_shape: What the user asks for; None leaves it to the model and its image processor.

    Raises:
        ValueError: if neither says it, or what the user asks for is not a shape.
    """
    if pixel_values_shape is not None:
        return tuple(black_image(model, pixel_values_shape).shape[1:])
    try:
        return configured_shape(model)
    except ValueError as error:
        if image_processor is None:
            raise ValueError(f"{str(error).rstrip('.')}, or pass `pixel_values_shape=…`.") from None
    return processed_shape(image_processor)


def processed_shape(image_processor: Any) -> tuple[int, ...]:
    """Return the shape of what an image processor makes of a square image, `(channels, height, width)` for most."""
    square = Image.new("RGB", (256, 256))
    return tuple(image_processor(images=square, return_tensors="pt")["pixel_values"].shape[1:])


def image_part(model: nn.Module, pixel_values_shape: Sequence[int] | None = None) -> nn.Module:
    """Return the model itself if it runs on images alone, else its `ImagePart`.

    Args:
        model: The model.
        pixel_values_shape: Shape of an image to try it on, `(channels, height, width)`; default: as its configuration says.

    Raises:
        ValueError: if neither runs on a batch of images, or on such a size; the message names the part to export.
    """
    if isinstance(model, ImagePart):
        return model
    name = type(model).__name__
    try:
        image = black_image(model, pixel_values_shape)
        call, images = ModelCall().bound(model, ModelInputs(image)), image.repeat(2, 1, 1, 1)
    except ValueError as error:
        if pixel_values_shape is not None and (configured := _size_that_runs(model)) is not None:
            asked = format_size(pixel_values_shape[1:])
            raise ValueError(
                f"{name} does not run on images of {asked} pixels, only on those of {configured}, which its configuration "
                "names."
            ) from error
        raise ValueError(f"{name} cannot be exported, since a file takes images of one size alone: {error}") from error
    if call.part == WHOLE and not call.with_text:
        return model
    part = ImagePart(model)
    try:
        with evaluation_mode(model), torch.no_grad():
            if call.part == FEATURES[0] and all(len(each) == 2 for each in part(images).values()):
                return part
    except Exception:  # it takes other inputs too, or returns something else
        pass
    inside = call.part if call.part != WHOLE and not is_features(call.part) else _tower(model, ModelInputs(images))
    remedy = f" Export its vision part alone, such as `model.{inside}`, from Python." if inside else ""
    raise ValueError(f"{name} takes more than images, and an exported file takes images alone.{remedy}")


def _size_that_runs(model: nn.Module) -> str | None:
    """Return the size that the configuration names if the model runs on images of it, else None."""
    try:
        image = black_image(model)
        ModelCall().bound(model, ModelInputs(image))
    except ValueError:
        return None
    return format_size(image.shape[2:])


def _tower(model: nn.Module, inputs: ModelInputs) -> str | None:
    """Return the name of the outermost part of a model that takes such inputs and no text."""
    names = (name for name in possible_parts(model, inputs) if name != WHOLE and not is_features(name))
    return next((name for name in names if "input_ids" not in takes(model.get_submodule(name))), None)
