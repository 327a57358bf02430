"""Batches of images, ready for a model, from whatever a user holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from .decoding import BrokenImageError, decode_image, holds_image
from .sources import find_image_column, load_image_dataset


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Batch:
    """A batch of images.

    Attributes:
        pixel_values: `[batch, channels, height, width]`, float32.
        labels: `[batch]`, int64, or None.
    """

    pixel_values: Tensor
    labels: Tensor | None = None


class ImageBatches:
    """Iterates over images in batches, in a fixed order; broken files are named, left out and counted.

    Args:
        source: A `datasets.Dataset` with an image column, a folder, a Hub id, a sequence of PIL images or paths, or an
            iterable (such as a `DataLoader`) of `pixel_values`: tensors `[batch, channels, height, width]` or mappings
            with `pixel_values` (and perhaps `labels`).
        image_processor: The model's; needed unless `pixel_values` are given.
        batch_size: Images per batch; a source of `pixel_values` keeps its own batches.
        image_column: Default: the one image column there is.
        label_column: Column to deliver as `labels`; None delivers none.
        label_map: Model label by dataset label, if they differ.
        max_broken_share: Tolerated share of images that cannot be decoded.
        num_channels: Channels that the model takes; 1 makes grey images.
        num_workers: Processes that decode ahead.

    Attributes:
        num_images: Number of images in the source, broken ones included; None if it cannot be known.
        broken: Names of the images that could not be decoded in the last pass.

    Raises:
        ValueError: for a missing image processor, image column or label column.
    """

    def __init__(
        self,
        source: Any,
        *,
        image_processor: Any = None,
        batch_size: int = 32,
        image_column: str | None = None,
        label_column: str | None = None,
        label_map: Sequence[int] | None = None,
        max_broken_share: float = 0.05,
        num_channels: int = 3,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a positive number of images.")
        if not 0 <= max_broken_share <= 1:
            raise ValueError(f"max_broken_share={max_broken_share} is not in [0, 1].")
        if isinstance(source, str | Path | datasets.DatasetDict):
            source = load_image_dataset(source)
        self._source = source
        self._processor = image_processor
        self._batch_size = batch_size
        self._label_column = label_column
        self._label_map = label_map
        self._max_broken_share = max_broken_share
        self._num_channels = num_channels
        self._num_workers = num_workers
        self._exhausted = False
        self.broken: list[str] = []
        self.num_images: int | None = None

        self._rows = _undecoded_rows(source, image_column, label_column)
        if self._rows is not None:
            self.num_images = len(self._rows)
            if image_processor is None:
                raise ValueError(
                    "Images need the model's image processor; pass `image_processor=AutoImageProcessor.from_pretrained"
                    "(…)`, or give batches of `pixel_values`."
                )
        elif isinstance(source, Tensor) or not isinstance(source, Iterable):
            raise TypeError(
                f"A {type(source).__name__} is no source of images; give a dataset, a folder, a Hub id, a list of images "
                "or an iterable of batches of `pixel_values` (a single tensor goes into a list)."
            )

    def __iter__(self) -> Iterator[Batch]:
        self.broken = []
        batches = self._from_pixel_values() if self._rows is None else self._from_images(self._rows)
        shape = None
        for batch in batches:
            if shape is not None and batch.pixel_values.shape[1:] != shape:
                raise ValueError(
                    f"Images of shape {tuple(batch.pixel_values.shape[1:])} follow images of shape {tuple(shape)}; let "
                    "the image processor resize them to one size."
                )
            shape = batch.pixel_values.shape[1:]
            yield batch

    def _from_pixel_values(self) -> Iterator[Batch]:
        iterator = iter(self._source)
        if iterator is self._source:
            if self._exhausted:
                raise ValueError(
                    "The iterator of `pixel_values` was used up by an earlier pass; give a list or a DataLoader, which "
                    "can be iterated again."
                )
            self._exhausted = True
        for item in iterator:
            pixel_values, labels = item, None
            if isinstance(item, Mapping):
                if "pixel_values" not in item:
                    raise ValueError(f"A batch has no `pixel_values`; its keys are {', '.join(map(str, item))}.")
                pixel_values, labels = item["pixel_values"], item.get("labels")
            yield Batch(_check_pixels(pixel_values, self._num_channels), labels)

    def _from_images(self, rows: _Rows) -> Iterator[Batch]:
        allowed = self._max_broken_share * len(rows)
        loader = DataLoader(
            rows,
            batch_size=self._batch_size,
            shuffle=False,
            num_workers=self._num_workers,
            collate_fn=self._collate,
        )
        usable = 0
        for batch, broken in loader:
            for message in broken:
                logger.warning(f"Left out: {message}")
            self.broken.extend(broken)
            if len(self.broken) > allowed:
                raise ValueError(
                    f"{len(self.broken)} of {len(rows)} images cannot be decoded, more than the tolerated share of "
                    f"{self._max_broken_share:.1%}; the first are: {'; '.join(self.broken[:3])}. Mend or remove them, or "
                    "raise max_broken_share."
                )
            if batch is not None:
                usable += len(batch.pixel_values)
                yield batch
        if not usable:
            raise ValueError("The dataset holds no usable image.")

    def _collate(self, rows: list[tuple[int, Any, Any]]) -> tuple[Batch | None, list[str]]:
        images, labels, broken = [], [], []
        for index, item, label in rows:
            try:
                image = decode_image(item, name=f"image {index}")
            except BrokenImageError as error:
                broken.append(str(error))
                continue
            images.append(image.convert("L") if self._num_channels == 1 else image)
            labels.append(label)
        if not images:
            return None, broken
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
        if isinstance(pixels, list):
            raise ValueError(
                "The image processor gives images of different sizes; let it resize and crop them to one."
            )
        return Batch(_check_pixels(pixels, self._num_channels), self._labels(labels)), broken

    def _labels(self, labels: list[Any]) -> Tensor | None:
        if self._label_column is None:
            return None
        mapped = labels if self._label_map is None else [self._label_map[label] for label in labels]
        return torch.tensor(mapped, dtype=torch.long)


class _Rows(Sequence[tuple[int, Any, Any]]):
    """Rows `(index, undecoded image, label)` of a dataset or of a list of images."""

    def __init__(self, items: Any, image_column: str | None = None, label_column: str | None = None) -> None:
        self._items = items
        self._image_column = image_column
        self._label_column = label_column

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        if self._image_column is None:
            return index, item, None
        return index, item[self._image_column], item[self._label_column] if self._label_column else None


def _undecoded_rows(source: Any, image_column: str | None, label_column: str | None) -> _Rows | None:
    """The source as rows of undecoded images; None if it delivers `pixel_values` itself."""
    if isinstance(source, datasets.Dataset):
        if "pixel_values" in source.column_names and image_column is None:
            return None
        data = load_image_dataset(source, image_column=image_column)
        if label_column is not None and label_column not in data.column_names:
            raise ValueError(
                f"label_column={label_column!r} does not exist; the columns are {', '.join(data.column_names)}."
            )
        return _Rows(data, find_image_column(data, image_column), label_column)
    is_list = isinstance(source, Sequence) and not isinstance(source, bytes) and len(source) > 0
    return _Rows(source) if is_list and holds_image(source[0]) else None


def _check_pixels(pixel_values: Any, num_channels: int) -> Tensor:
    """Check what a source gives as `pixel_values`; a single image becomes a batch of one."""
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"`pixel_values` is a {type(pixel_values).__name__}, not a tensor; give tensors of shape [batch, channels, "
            "height, width], or images together with an image processor."
        )
    pixel_values = pixel_values[None] if pixel_values.ndim == 3 else pixel_values
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` has the shape {tuple(pixel_values.shape)}; the model needs [batch, {num_channels}, height, "
            "width]."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` has the dtype {pixel_values.dtype}; give floating point values as the image processor "
            "scales them."
        )
    return pixel_values
