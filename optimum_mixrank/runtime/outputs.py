"""How a model is called, and what to compare of its output, whatever its head: distributions of classes, or features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .formatting import shorten, type_of
from .forward import black_image, evaluation_mode, fixed_random_state, image_size_explained, placement
from .inputs import ModelInputs
from .kinds import EMBEDDINGS, recognized
from .model_output import CLASSES
from .model_output import ModelOutput as ModelOutput
from .output_fields import field_of, fields_of, listed, per_image, tensors_in
from .parts import FEATURES, WHOLE, accepted_by, is_features, part_of, possible_parts, takes, text_model_refused


_PREFERRED = ("feature_maps", "last_hidden_state", "logits", "reconstruction", "pooler_output")
"""Outputs to compare, the first that a model gives; one that gives none of them is compared by all its tensors."""

_SEEN = ("pooler_output", "image_embeds", "deepstack_features")
"""What `get_image_features` returns for the rest of the model."""

_TOKENS = "last_hidden_state"
"""What it returns where there is nothing of these."""


@dataclass(frozen=True)
class ModelCall:
    """How a model is called and which of its outputs are compared.

    Attributes:
        outputs: Names of the outputs to compare; none are chosen by structure, see `select_output`.
        interpolate_pos_encoding: Whether images may have another size than the position embeddings.
        part: What of the model takes images; see `parts`.
        with_text: Whether the model gets text as well, where a batch holds it.
        example: Inputs to try the model on; by default a black image.
    """

    outputs: tuple[str, ...] = ()
    interpolate_pos_encoding: bool = False
    part: str = WHOLE
    with_text: bool = False
    example: ModelInputs | None = field(default=None, compare=False, repr=False)

    @classmethod
    def named(cls, outputs: str | Sequence[str] | None, interpolate_pos_encoding: bool) -> ModelCall:
        """Return the call for one output, several or, with None, those chosen by structure."""
        return cls((outputs,) if isinstance(outputs, str) else tuple(outputs or ()), interpolate_pos_encoding)

    def check(self, model: nn.Module) -> None:
        """Check that position embeddings can be interpolated if they have to.

        Raises:
            ValueError: if the model has no such argument.
        """
        if self.interpolate_pos_encoding and "interpolate_pos_encoding" not in takes(model):
            raise ValueError(
                f"interpolate_pos_encoding=True, but {type(model).__name__} has no such argument: either it takes images "
                "of any size as it is, or only those of its configuration. Leave it out."
            )

    def bound(self, model: nn.Module, example: ModelInputs | None = None) -> ModelCall:
        """Return the call of the part of a model that takes images; it is found by trying, on an example.

        Args:
            model: The model.
            example: One image or a few, as the model's processor gives them; by default the example of this call, or a
                black image if it has none.

        Raises:
            ValueError: if no part runs on the example; the message says why the whole does not. Also if position
                embeddings cannot be interpolated, or a named output is lacking.
        """
        self.check(model)
        inputs = self.example if example is None else example
        try:
            inputs = ModelInputs(black_image(model)) if inputs is None else inputs
        except ValueError as error:
            raise ValueError(_not_for_images(model, error)) from error
        tried = replace(self, example=example or self.example)
        calls = [replace(tried, part=part) for part in possible_parts(model, inputs)]
        if set(inputs.without_text()) != set(inputs):
            calls.append(replace(tried, with_text=True))
        reason: Exception | None = None
        for call in calls:
            try:
                with evaluation_mode(model):
                    output = call.run(model, call.example_for(model))
            except Exception as error:
                # The whole without its text has the least to say.
                reason = error if reason is None or call.with_text or is_features(call.part) else reason
                continue
            if self.outputs:
                call.select(model, output, len(inputs))
            return call
        assert reason is not None  # the whole is always tried
        raise ValueError(_not_for_images(model, reason)) from reason

    def example_for(self, model: nn.Module) -> ModelInputs:
        """Return inputs to try a model on, on its device and in its dtype.

        Raises:
            ValueError: if there are none, and the model's configuration names no size of images.
        """
        if self.example is None:
            return ModelInputs(black_image(model))
        return self.example.to(*placement(model))

    def run(self, model: nn.Module, inputs: ModelInputs | Tensor) -> Any:
        """Call a model, or the part of it that takes images, and return all that it returns.

        Whatever it draws at random, such as masks, is the same in every call.

        Raises:
            ValueError: for images of another size than the model takes.
        """
        inputs = ModelInputs.of(inputs)
        if not self.with_text:
            inputs = inputs.without_text()
        called, accepted = part_of(model, self.part), accepted_by(model, self.part)
        given: dict[str, Any] = dict(inputs.only(accepted))
        if self.interpolate_pos_encoding and "interpolate_pos_encoding" in accepted:
            given["interpolate_pos_encoding"] = True
        with image_size_explained(model, inputs.main), fixed_random_state(inputs.main.device):
            return called(**given)

    def select(self, model: nn.Module, output: Any, num_images: int) -> ModelOutput:
        """Return what to compare of an output; see `select_output` and `select_features`."""
        if is_features(self.part) and not self.outputs:
            return select_features(output, num_images, self.part.rpartition(".")[2])
        # Of a tower inside a model the rest may read every token: the configuration of the whole is asked.
        return select_output(output, getattr(model, "config", None), self.outputs, num_images)

    def __call__(self, model: nn.Module, inputs: ModelInputs | Tensor) -> ModelOutput:
        """Call a model and return what to compare of its output."""
        inputs = ModelInputs.of(inputs)
        return self.select(model, self.run(model, inputs), len(inputs))


def _not_for_images(model: nn.Module, reason: Exception) -> str:
    """Return why a model cannot be called with images, and what to do."""
    name = type(model).__name__
    shown = shorten(" ".join(str(reason).split()), 300)
    if (refused := text_model_refused(model)) is not None:
        return refused
    return (
        f"What of {name} takes images is unknown, since no part of it runs on the images alone ({type(reason).__name__}: "
        f"{shown}). Calibrate with batches as the model's own processor returns them (a mapping of all its inputs), or "
        "compress the vision tower by itself (`model.vision_model`, for example)."
    )


PLAIN_CALL = ModelCall()


def select_output(output: Any, config: Any, names: Sequence[str] = (), num_images: int | None = None) -> ModelOutput:
    """Select what to compare from whatever a model returns.

    Outputs of a known kind come first: classes, boxes, masks, tokens, depth, …; see `kinds`. All others (encoders,
    backbones, multi-label or regression heads) give feature maps, or else the last hidden state, or else the output of the
    head: all its floating-point tensors, except losses, hidden states, attentions and caches.

    Args:
        output: The value that the model returned.
        config: The model's configuration; its `problem_type` says whether classes exclude one another.
        names: The outputs to select instead; a dot leads into an output that has outputs of its own.
        num_images: Number of images of the batch; tensors that are not `[images, ...]` are passed over.

    Raises:
        ValueError: if the output holds no such tensor; the message lists what it holds.
    """
    features: list[Tensor] = []
    if names:
        features = [feature for name in names for feature in _named(output, name, num_images)]
    known = recognized({name: field_of(output, name) for name in names} if names else output, config)
    # What the kind does not know of must not be dropped if it was asked for.
    is_all = known is not None and (not names or len(known.tensors) == len(features))
    if known is not None and is_all and _has_rows(known, num_images):
        return known
    if not names:
        preferred = (list(tensors_in(field_of(output, name))) for name in _PREFERRED)
        features = next((found for found in preferred if found), []) or per_image(tensors_in(output), num_images)
    if not features:
        raise ValueError(
            f"The {type(output).__name__} holds neither logits nor features of images, but {listed(output)}; use a model "
            "for images, or name the outputs to compare by `output_names`."
        )
    return ModelOutput(features=tuple(features))


def _has_rows(known: ModelOutput, num_images: int | None) -> bool:
    """Return whether the tensors of an output have a row for every image; those of videos may have one for every frame."""
    rows = {len(each) for each in known.tensors}
    of_images = known.kind in (CLASSES, EMBEDDINGS)
    return (
        num_images is None
        or rows == {num_images}
        or (not of_images and len(rows) == 1 and not rows.pop() % num_images)
    )


def select_features(output: Any, num_images: int, method: str = FEATURES[0]) -> ModelOutput:
    """Select what the rest of a model sees of images, videos or sounds from what its method for them returns.

    Transformers 5 returns it beside the states of the tower; 4.57 returns it alone. Features of images of different sizes
    are one tensor with a row for every token. One vector per image is its embedding. What belongs to no image, such as the
    embeddings that Ovis2 puts around those of an image, is passed over.

    Args:
        output: What the method returned.
        num_images: Number of images of the batch.
        method: The method, one of `FEATURES`, for messages.

    Raises:
        ValueError: if there is no tensor.
    """
    values = [value for value in _seen(output) if any(True for _ in tensors_in(value))]
    # Llama 4 returns the tokens of its tower alone.
    values = values or [value for value in [field_of(output, _TOKENS)] if isinstance(value, Tensor)]
    if not values:
        raise ValueError(f"`{method}` returns no features, but {listed(output)}.")
    found = _of_images(values[0], num_images)
    first = found[0]
    by_image = first.ndim > 2 and len(first) == num_images
    tokens = first.shape[:2].numel() if by_image else len(first)
    for value in values[1:]:
        tensors = list(tensors_in(value))
        if all(len(tensor) in (tokens, len(first)) for tensor in tensors):
            # What several layers say of the tokens of all images, one after the other.
            found += [t.unflatten(0, (num_images, -1)) if by_image and len(t) == tokens else t for t in tensors]
        else:
            found += _of_images(value, num_images)
    features = tuple(tensor[:, None] if tensor.ndim == 1 else tensor for tensor in found if len(tensor) == len(first))
    is_embedding = len(features) == 1 and features[0].ndim == 2 and len(features[0]) == num_images
    return ModelOutput(features=features, kind="embeddings" if is_embedding else "")


def _seen(output: Any) -> list[Any]:
    """Return what the rest of a model sees: fields by name, or the elements of a tuple that has several of them."""
    if fields_of(output):
        return [field_of(output, name) for name in _SEEN]
    is_nested = isinstance(output, tuple) and any(isinstance(each, list | tuple) for each in output)
    return list(output) if is_nested else [output]


def _of_images(value: Any, num_images: int) -> list[Tensor]:
    """Return the tensors of a value, those of which there is one per image as a single one."""
    tensors = list(tensors_in(value))
    is_list = isinstance(value, list | tuple) and len(tensors) == num_images
    if not is_list or len({tensor.shape[1:] for tensor in tensors}) > 1:
        return tensors
    same = len({tensor.shape for tensor in tensors}) == 1
    return [torch.stack(tensors) if same else torch.cat(tensors)]


def _named(output: Any, name: str, num_images: int | None) -> list[Tensor]:
    """Return the tensors of a named output."""
    found = list(tensors_in(field_of(output, name)))
    if not found:
        raise ValueError(
            f"output_names={name!r}: {type_of(output)} holds no such tensors of floating-point "
            f"numbers, but {listed(output)}."
        )
    fitting = per_image(found, num_images)
    if len(fitting) < len(found):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found)
        raise ValueError(
            f"output_names={name!r} has the shape {shapes} for {num_images} images; only outputs with one row per image "
            f"can be compared. The {type(output).__name__} holds {listed(output)}."
        )
    return fitting
