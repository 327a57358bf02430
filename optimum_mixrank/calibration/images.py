"""Batches of images, ready for a model, from whatever a user holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from .collating import Batch, Collator
from .decoding import BrokenImageError
from .rows import ImageRows, Row, delivers_images, num_images, stream_rows
from .sources import load_image_dataset


logger = logging.get_logger(__name__)

__all__ = ["Batch", "ImageBatches"]


class ImageBatches:
    """Iterates over images in batches, in the source's order; broken files are named, left out and counted.

    Args:
        source: A `datasets.Dataset` with an image column, a folder, a Hub id, a list of PIL images or paths, or any
            iterable (such as a `DataLoader`) of `pixel_values`: tensors `[batch, channels, height, width]` or
            `[channels, height, width]`, pairs of tensors and labels, or mappings with `pixel_values`. An iterable of
            images serves too.
        image_processor: The model's; needed unless `pixel_values` are given.
        batch_size: Images per batch; batches of `pixel_values` stay as they are.
        image_column: Default: the one image column there is.
        label_column: Column to deliver as `labels`; None delivers only those that come with `pixel_values`.
        label_map: Model label by dataset label, if they differ.
        max_broken_share: Tolerated share of images that cannot be decoded, in [0, 1].
        num_channels: Channels that the model takes; 1 makes grey images.
        num_workers: Processes that decode ahead, for datasets and lists of images.
        dtype: Of the pixels.

    Attributes:
        num_images: Number of images in the source, broken ones included; None if it cannot be known beforehand.
        broken: Names of the images that could not be decoded in the last pass.

    Raises:
        TypeError: for a source of another kind.
        ValueError: for a missing image processor, image column or label column. While iterating: for more broken images
            than tolerated, no usable image, images of different sizes or unusable `pixel_values`, and for the second
            pass through an iterator.
    """

    def __init__(
        self,
        source: Any,
        *,
        image_processor: Any = None,
        batch_size: int = 32,
        image_column: str | None = None,
        label_column: str | None = None,
        label_map: Sequence[int] | Mapping[Any, int] | None = None,
        max_broken_share: float = 0.05,
        num_channels: int = 3,
        num_workers: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a positive number of images.")
        if not 0 <= max_broken_share <= 1:
            raise ValueError(f"max_broken_share={max_broken_share} is not in [0, 1].")
        if isinstance(source, str | Path | datasets.DatasetDict):
            source = load_image_dataset(source, image_column=image_column)
        _check_kind(source)
        self._source = source
        self._collate = Collator(image_processor, num_channels, label_map, dtype)
        self._batch_size = batch_size
        self._columns = (image_column, label_column)
        self._max_broken_share = max_broken_share
        self._num_workers = num_workers
        self._rows = ImageRows(source, *self._columns) if delivers_images(source) else None
        self._used_up = False
        self._named: set[str] = set()
        self.broken: list[str] = []
        self.num_images = num_images(source) if self._rows is None else len(self._rows)
        if self._rows is not None:
            self._collate.check_image_processor()

    @property
    def num_broken(self) -> int:
        """Images that could not be decoded in the last pass."""
        return len(self.broken)

    def __len__(self) -> int:
        """Number of batches if no image is broken.

        Raises:
            TypeError: if it cannot be known beforehand, as for a generator.
        """
        if self._rows is not None:
            return math.ceil(len(self._rows) / self._batch_size)
        if isinstance(self._source, DataLoader) and self._source.batch_size is not None:
            return len(self._source)
        raise TypeError(f"A {type(self._source).__name__} of `pixel_values` does not tell its number of batches.")

    def __iter__(self) -> Iterator[Batch]:
        self.broken = []
        usable, shape = 0, None
        for batch, broken in self._stream() if self._rows is None else self._load(self._rows):
            self._leave_out(broken)
            if self._rows is not None:
                self._check_broken_share(len(self._rows))
            if batch is None or batch.num_images == 0:
                continue
            if shape is not None and batch.pixel_values.shape[1:] != shape:
                raise ValueError(
                    f"Images of different sizes: {list(shape)} and {list(batch.pixel_values.shape[1:])}; let the image "
                    "processor resize and crop them to one size."
                )
            shape = batch.pixel_values.shape[1:]
            usable += batch.num_images
            yield batch
        self._check_broken_share(usable + self.num_broken)
        if not usable:
            raise ValueError(
                f"There is no image to use ({self.num_broken} broken ones were left out); check the source of images."
            )

    def _load(self, rows: ImageRows) -> Iterable[tuple[Batch | None, list[BrokenImageError]]]:
        return DataLoader(
            rows,  # a sequence serves as a map-style dataset
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=self._collate,
        )

    def _stream(self) -> Iterator[tuple[Batch | None, list[BrokenImageError]]]:
        if isinstance(self._source, Iterator):
            if self._used_up:
                raise ValueError(
                    f"The {type(self._source).__name__} was used up by an earlier pass; give a list or a DataLoader, "
                    "which can be iterated again."
                )
            self._used_up = True
        single: list[Row] = []
        for row in stream_rows(self._source, *self._columns):
            if single and (row.is_batch or len(single) == self._batch_size):
                yield self._collate(single)
                single = []
            if row.is_batch:
                yield self._collate([row])
            else:
                single.append(row)
        if single:
            yield self._collate(single)

    def _leave_out(self, broken: Iterable[BrokenImageError]) -> None:
        for error in broken:
            self.broken.append(error.name)
            if error.name not in self._named:  # once, however many passes there are
                self._named.add(error.name)
                logger.warning(f"Broken image left out: {error}")

    def _check_broken_share(self, total: int) -> None:
        # A quotient, not a product with the share: 0.29 * 100 < 29.
        if self.num_broken and self.num_broken / total > self._max_broken_share:
            raise ValueError(
                f"At least {self.num_broken} of {total} images ({self.num_broken / total:.1%}) cannot be decoded, more "
                f"than max_broken_share={self._max_broken_share} tolerates. The first are {', '.join(self.broken[:3])}. "
                "Mend or remove them, or raise max_broken_share."
            )


def _check_kind(source: Any) -> None:
    if isinstance(source, Tensor):
        kind = f"tensor of shape {list(source.shape)}"
        usable = source.ndim == 4
    else:
        kind = type(source).__name__
        is_one_item = isinstance(source, bytes | Mapping)
        usable = not is_one_item and isinstance(source, Iterable | torch.utils.data.Dataset)
    if not usable:
        raise TypeError(
            f"A {kind} is no source of images; give a dataset, a folder, a Hub id, a list of images, or an iterable of "
            "batches of `pixel_values` (a single batch goes into a list)."
        )
