"""Turn rows into one batch: decode, apply the image processor, check what the model will see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import BrokenImageError, decode_image
from .rows import Row


@dataclass(frozen=True)
class Batch:
    """A batch of images.

    Attributes:
        pixel_values: `[batch, channels, height, width]`, finite.
        labels: `[batch]`, int64, or None.
        index: Number of the batch among those of all processes.
    """

    pixel_values: Tensor
    labels: Tensor | None = None
    index: int = 0

    @property
    def num_images(self) -> int:
        """Number of images in this batch."""
        return len(self.pixel_values)

    def pin_memory(self) -> Batch:
        """Return a copy with pixels in pinned memory; called by `DataLoader`."""
        return replace(self, pixel_values=self.pixel_values.pin_memory())


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

    def check_image_processor(self) -> None:
        """Raise a ValueError if there is no image processor."""
        if self.image_processor is None:
            raise ValueError(
                "Images need the model's image processor: pass `image_processor=AutoImageProcessor.from_pretrained(…)`, "
                "or give batches of `pixel_values`."
            )

    def __call__(self, rows: Sequence[Row]) -> Collated:
        """Return the batch and the broken images among the rows."""
        if len({row.pixel_values is None for row in rows}) > 1:
            raise ValueError("Images and `pixel_values` are mixed; give one or the other.")
        if rows[0].pixel_values is not None:
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

    def _batch(self, rows: Sequence[Row], pixel_values: Tensor) -> Batch:
        shape, dtype = tuple(pixel_values.shape), pixel_values.dtype
        if len(shape) != 4 or shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` of {rows[0].name} have the shape {list(shape)}; the model needs [batch, "
                f"{self.num_channels}, height, width]."
            )
        if not dtype.is_floating_point:
            raise ValueError(
                f"`pixel_values` of {rows[0].name} have the dtype {dtype}; give floating point values, rescaled and "
                "normalized by the image processor."
            )
        pixel_values = pixel_values.to(self.dtype)
        finite = torch.isfinite(pixel_values).flatten(1).all(1)
        if not finite.all():
            row = rows[int(finite.logical_not().nonzero()[0])] if len(rows) == len(finite) else rows[0]
            raise ValueError(
                f"`pixel_values` of {row.name} contain NaN or Inf; check the image processor and its image_std."
            )
        return Batch(pixel_values, self._labels(rows, len(pixel_values)))

    def _stack(self, rows: Sequence[Row]) -> Tensor:
        tensors = [row.pixel_values for row in rows if row.pixel_values is not None]
        if rows[0].is_batch:
            return tensors[0]
        if len({tensor.shape for tensor in tensors}) != 1:
            raise different_sizes(sorted({tuple(tensor.shape) for tensor in tensors}))
        return torch.stack(tensors)

    def _process(self, images: list[Image.Image]) -> Tensor:
        self.check_image_processor()
        inputs: list[Any] = list(images)
        if self.num_channels == 1:
            # With an axis of channels, since not every image processor takes [height, width].
            inputs = [np.asarray(image.convert("L"))[..., None] for image in images]
        try:
            return self.image_processor(images=inputs, return_tensors="pt")["pixel_values"]
        except (ValueError, RuntimeError):
            each = [self.image_processor(images=[image], return_tensors="pt")["pixel_values"] for image in inputs]
            shapes = {tuple(pixel_values.shape[1:]) for pixel_values in each}
            if len(shapes) > 1:
                raise different_sizes(sorted(shapes)) from None
            raise

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
