"""Turn rows into one batch: decode, apply the image processor, check what the model will see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...runtime.inputs import MAIN_NAMES, PIXELS, ModelInputs, concatenated
from .decoding import BrokenImageError, decode_image
from .rows import Row


@dataclass(frozen=True)
class Batch:
    """A batch of images.

    Attributes:
        inputs: What the model gets, finite; a tensor is `pixel_values`.
        labels: `[batch]`, int64, or None.
        index: Number of the batch among those of all processes.
    """

    inputs: ModelInputs
    labels: Tensor | None = None
    index: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", ModelInputs.of(self.inputs))

    @property
    def pixel_values(self) -> Tensor:
        """The main input: of images `[batch, channels, height, width]`."""
        return self.inputs.main

    @property
    def num_images(self) -> int:
        """Number of images in this batch."""
        return len(self.inputs)

    def pin_memory(self) -> Batch:
        """Return a copy with inputs in pinned memory; called by `DataLoader`."""
        return replace(self, inputs=self.inputs.pin_memory())


Collated = tuple[Batch | None, list[BrokenImageError]]
"""A batch, or None if no image is usable, and the broken images."""


@dataclass(frozen=True)
class Collator:
    """Turns rows into a batch, possibly in a worker of a `DataLoader`; see `ImageBatches` for the attributes."""

    image_processor: Any
    num_channels: int
    label_map: Sequence[int] | Mapping[Any, int] | None
    dtype: torch.dtype
    max_image_pixels: int | None = None
    input_names: frozenset[str] = frozenset({PIXELS})

    def check_image_processor(self) -> None:
        """Raise a ValueError if there is no image processor."""
        if self.image_processor is None:
            raise ValueError(
                "Images need the model's image processor: pass `image_processor=AutoImageProcessor.from_pretrained(…)`, "
                "or give batches of `pixel_values`."
            )

    def __call__(self, rows: Sequence[Row]) -> Collated:
        """Return the batch and the broken images among the rows."""
        if len({row.inputs is None for row in rows}) > 1:
            raise ValueError("Images and `pixel_values` are mixed; give one or the other.")
        if rows[0].inputs is not None:
            return self._batch(rows, self._stack(rows)), []
        usable, images, broken = [], [], []
        for row in rows:
            try:
                images.append(decode_image(row.image, row.name, self.max_image_pixels))
                usable.append(row)
            except BrokenImageError as error:
                # Only names and reasons travel between processes; the cause may hold open files.
                broken.append(BrokenImageError(error.name, str(error.reason)))
        return (self._batch(usable, self._process(images)) if images else None), broken

    def or_error(self, rows: Sequence[Row]) -> Collated | Exception:
        """Return what `__call__` returns, or the error that it raises.

        `DataLoader` would raise the error of a worker with the worker's traceback in its message.
        """
        try:
            return self(rows)
        except Exception as error:
            return error

    def _batch(self, rows: Sequence[Row], inputs: ModelInputs) -> Batch:
        name, main = inputs.main_name, inputs.main
        shape, dtype = tuple(main.shape), main.dtype
        alone = list(inputs) == [PIXELS] and main.ndim != 5
        if alone and (main.ndim != 4 or shape[1] != self.num_channels):
            raise ValueError(
                f"`pixel_values` of {rows[0].name} have the shape {list(shape)}; the model needs [batch, "
                f"{self.num_channels}, height, width]."
            )
        if not main.is_floating_point():
            raise ValueError(
                f"`{name}` of {rows[0].name} have the dtype {dtype}; give floating point values, rescaled and "
                "normalized by the image processor."
            )
        inputs = inputs.to(dtype=self.dtype)
        finite = torch.isfinite(inputs.main).flatten(1).all(1)
        if not finite.all():
            row = rows[int(finite.logical_not().nonzero()[0])] if len(rows) == len(finite) else rows[0]
            raise ValueError(
                f"`{name}` of {row.name} contain NaN or Inf; check the image processor and its image_std."
            )
        return Batch(inputs, self._labels(rows, len(inputs)))

    def _stack(self, rows: Sequence[Row]) -> ModelInputs:
        given = [row.inputs for row in rows if row.inputs is not None]
        if rows[0].is_batch:
            return self._named(given[0], rows[0].name)
        shapes = {tuple(each[PIXELS].shape) for each in given}
        if len(shapes) != 1:
            raise different_sizes(sorted(shapes))
        names = [name for name in given[0] if all(name in each for each in given)]
        return self._named({name: torch.stack([each[name] for each in given]) for name in names}, rows[0].name)

    def _named(self, tensors: Mapping[str, Any], name: str) -> ModelInputs:
        """Return those of the tensors that the model takes."""
        kept = {key: value for key, value in tensors.items() if key in self.input_names and isinstance(value, Tensor)}
        main = next((key for key in MAIN_NAMES if key in tensors), None)
        if main is not None and main not in kept:
            kept[main] = tensors[main]
        try:
            return ModelInputs(kept)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _process(self, images: list[Image.Image]) -> ModelInputs:
        self.check_image_processor()
        inputs: list[Any] = list(images)
        if self.num_channels == 1:
            # With an axis of channels, since not every image processor takes [height, width].
            inputs = [np.asarray(image.convert("L"))[..., None] for image in images]
        try:
            found = self._named(self.image_processor(images=inputs, return_tensors="pt"), "A batch")
        except (ValueError, RuntimeError):
            each = [self._processed_alone(image) for image in inputs]
            shapes = {next(iter(one.entry_shapes.values())) for one in each}
            if len(shapes) > 1:
                raise different_sizes(sorted(shapes)) from None
            raise
        if len(found) == len(inputs):
            return found
        # Several images in one list are parts of one sample for some processors.
        return concatenated([self._processed_alone(image) for image in inputs])

    def _processed_alone(self, image: Any) -> ModelInputs:
        return self._named(self.image_processor(images=[image], return_tensors="pt"), "An image")

    def _labels(self, rows: Sequence[Row], count: int) -> Tensor | None:
        labels = rows[0].label if rows[0].is_batch else [row.label for row in rows]
        if labels is None or (not rows[0].is_batch and all(label is None for label in labels)):
            return None
        if isinstance(labels, Tensor | np.ndarray):
            labels = labels.tolist()
        if len(labels) != count:
            raise ValueError(f"{rows[0].name} has {len(labels)} labels for {count} images.")
        names = [rows[0].name] * count if rows[0].is_batch else [row.name for row in rows]
        return torch.tensor([self._label(*pair) for pair in zip(labels, names, strict=True)], dtype=torch.long)

    def _label(self, label: Any, name: str) -> int:
        label = label.item() if isinstance(label, Tensor | np.generic) else label
        if isinstance(self.label_map, Mapping):
            if label in self.label_map:
                return self.label_map[label]
        elif isinstance(label, int) and label >= 0 and (self.label_map is None or label < len(self.label_map)):
            return label if self.label_map is None else self.label_map[label]
        raise ValueError(
            f"The label {label!r} of {name} is not a class of the model; leave out images without a class."
        )


def different_sizes(shapes: Iterable[Sequence[int]]) -> ValueError:
    """Return the error for images of different shapes, `(channels, height, width)`."""
    found = " and ".join(str(list(shape)) for shape in list(shapes)[:3])
    return ValueError(f"Images of different sizes: {found}; let the image processor resize and crop them to one size.")
