"""How a model is called, and what to compare of its output, whatever its head: the logits of one softmax, or features."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward import black_image, evaluation_mode, image_size_explained


_PREFERRED = ("feature_maps", "last_hidden_state", "logits", "reconstruction", "pooler_output")
"""Outputs to compare, the first that a model gives; one that gives none of them is compared by all its tensors."""

_BESIDE = ("loss", "hidden_states", "attentions", "past_key_values", "cache")
"""Ends of the names of outputs that say nothing about the result."""


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


@dataclass(frozen=True)
class ModelCall:
    """How a model is called and which of its outputs are compared.

    Attributes:
        outputs: Names of the outputs to compare; none are chosen by structure, see `select_output`.
        interpolate_pos_encoding: Whether images may have another size than the position embeddings.
    """

    outputs: tuple[str, ...] = ()
    interpolate_pos_encoding: bool = False

    @classmethod
    def named(cls, outputs: str | Sequence[str] | None, interpolate_pos_encoding: bool) -> ModelCall:
        """Return the call for one output, several or, with None, those chosen by structure."""
        return cls((outputs,) if isinstance(outputs, str) else tuple(outputs or ()), interpolate_pos_encoding)

    def check(self, model: nn.Module) -> None:
        """Check that a model can be called in this way; if outputs are named, it runs on a black image.

        Raises:
            ValueError: if its position embeddings cannot be interpolated, or it lacks a named output.
        """
        if self.interpolate_pos_encoding and "interpolate_pos_encoding" not in _parameters(model):
            raise ValueError(
                f"interpolate_pos_encoding=True, but {type(model).__name__} has no such argument: either it takes images "
                "of any size as it is, or only those of its configuration. Leave it out."
            )
        if not self.outputs:
            return
        try:
            with evaluation_mode(model):
                output = model(pixel_values=black_image(model))
        except Exception:
            # Images of another size may pass; the names are then looked up when the first of them has.
            return
        self.select(model, output, 1)

    def run(self, model: nn.Module, pixel_values: Tensor) -> Any:
        """Call a model and return all that it returns.

        Raises:
            ValueError: for images of another size than the model takes.
        """
        options = {"interpolate_pos_encoding": True} if self.interpolate_pos_encoding else {}
        with image_size_explained(model, pixel_values):
            return model(pixel_values=pixel_values, **options)

    def select(self, model: nn.Module, output: Any, num_images: int) -> ModelOutput:
        """Return what to compare of an output; see `select_output`."""
        return select_output(output, getattr(model, "config", None), self.outputs, num_images)

    def __call__(self, model: nn.Module, pixel_values: Tensor) -> ModelOutput:
        """Call a model and return what to compare of its output."""
        return self.select(model, self.run(model, pixel_values), len(pixel_values))


PLAIN_CALL = ModelCall()


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def select_output(output: Any, config: Any, names: Sequence[str] = (), num_images: int | None = None) -> ModelOutput:
    """Select logits or features from whatever a model returns.

    Models with one softmax over classes give logits. All others (encoders, backbones, dense, multi-label or regression
    heads) give feature maps, or else the last hidden state, or else the output of the head: all its floating-point
    tensors, except losses, hidden states, attentions and caches.

    Args:
        output: The value that the model returned.
        config: The model's configuration; its `problem_type` says whether classes exclude one another.
        names: The outputs to select instead; a dot leads into an output that has outputs of its own.
        num_images: Number of images of the batch; tensors that are not `[images, ...]` are passed over.

    Raises:
        ValueError: if the output holds no such tensor; the message lists what it holds.
    """
    logits = _field(output, "logits")
    # Classes that do not exclude one another have no common distribution.
    exclusive = getattr(config, "problem_type", None) not in ("multi_label_classification", "regression")
    is_softmax = exclusive and isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1
    if is_softmax and tuple(names) in ((), ("logits",)):
        return ModelOutput(logits=logits)
    if names:
        features = [feature for name in names for feature in _named(output, name, num_images)]
    else:
        preferred = (list(_tensors(_field(output, name))) for name in _PREFERRED)
        features = next((found for found in preferred if found), []) or _per_image(_tensors(output), num_images)
    if not features:
        raise ValueError(
            f"A {type(output).__name__} holds neither logits nor features of images, but {_listed(output)}; use a model "
            "for images, or name the outputs to compare by `output_names`."
        )
    return ModelOutput(features=tuple(features))


def _named(output: Any, name: str, num_images: int | None) -> list[Tensor]:
    """Return the tensors of a named output."""
    value = output
    for part in name.split("."):
        value = _field(value, part)
    found = list(_tensors(value))
    if not found:
        raise ValueError(
            f"output_names={name!r}: a {type(output).__name__} holds no such tensors of floating-point numbers, but "
            f"{_listed(output)}."
        )
    fitting = _per_image(found, num_images)
    if len(fitting) < len(found):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found)
        raise ValueError(
            f"output_names={name!r} has the shape {shapes} for {num_images} images; only outputs with one row per image "
            f"can be compared. A {type(output).__name__} holds {_listed(output)}."
        )
    return fitting


def _per_image(tensors: Iterator[Tensor] | Sequence[Tensor], num_images: int | None) -> list[Tensor]:
    """Return the tensors with one row per image; a single number becomes a row."""
    fitting = [tensor for tensor in tensors if num_images is None or (tensor.ndim and len(tensor) == num_images)]
    return [tensor[:, None] if tensor.ndim == 1 else tensor for tensor in fitting]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Return the floating-point tensors in a value, however it is nested."""
    if isinstance(value, Tensor):
        if torch.is_floating_point(value):
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    else:
        for name, each in _fields(value).items():
            if not name.endswith(_BESIDE):
                yield from _tensors(each)


def _fields(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    return vars(output) if is_dataclass(output) else {}


def _field(output: Any, name: str) -> Any:
    # Transformers' outputs are mappings as well as objects; some attributes are deprecated names that warn when read.
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _listed(output: Any) -> str:
    """Describe what an output holds, for messages."""
    names = [name for name, value in _fields(output).items() if any(True for _ in _tensors(value))]
    return ", ".join(f"`{name}`" for name in names) or "no named tensors"
