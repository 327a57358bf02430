"""Batches of images, ready for a model, from whatever a user holds."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.logging import get_logger
from ..fingerprint import ImageFingerprint
from .collating import Batch, Collator, ErrorsReturned
from .decoding import BrokenImageError
from .high_resolution import enlarged_processor
from .rows import (
    ImageRows,
    Row,
    delivers_images,
    fingerprint_content,
    fingerprint_rows,
    num_images,
    single_rows,
    stream_rows,
)
from .sources import load_image_dataset


logger = get_logger(__name__)

Loaded = tuple[int, Batch | None, list[BrokenImageError]]

__all__ = ["Batch", "ImageBatches"]


class ImageBatches:
    """Iterates over images in batches, in the source's order; broken files are named, left out and counted.

    Several processes share the batches out: number b goes to process b modulo their number, and a process decodes no
    other. Batches are the same for any number of processes. After a pass all of them call `merge_across_processes`.

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
        num_workers: Processes that read and decode ahead, for datasets and lists of images.
        pin_memory: Whether to put the pixels where a GPU copies them from while it computes.
        dtype: Of the pixels.
        processes: Those that share the batches out.
        fingerprint: Whether to take the images' fingerprint.

    Attributes:
        num_images: Number of images in the source, broken ones included; None if it cannot be known beforehand.
        broken: Names of the images that could not be decoded in the last pass; after `merge_across_processes`, those of
            all processes.

    Raises:
        TypeError: for a source of another kind.
        ValueError: for a missing image processor, image column or label column, a negative number of workers, and for a
            DataLoader that shares its batches out already. While iterating: for more broken images than tolerated, no
            usable image, images of different sizes or unusable `pixel_values`, and for the second pass through an
            iterator.
        RuntimeError: while iterating, PyTorch's own if a worker dies.
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
        pin_memory: bool = False,
        dtype: torch.dtype = torch.float32,
        processes: Processes = SINGLE_PROCESS,
        fingerprint: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a positive number of images.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; 0 decodes in this process.")
        if not 0 <= max_broken_share <= 1:
            raise ValueError(f"max_broken_share={max_broken_share} is not in [0, 1].")
        if isinstance(source, str | Path | datasets.DatasetDict):
            source = load_image_dataset(source, image_column=image_column)
        _check_kind(source)
        if not processes.is_single:
            _check_whole(source)
        self._source = source
        self._processes = processes
        self._collate = Collator(image_processor, num_channels, label_map, dtype)
        self._batch_size = batch_size
        self._columns = (image_column, label_column)
        self._max_broken_share = max_broken_share
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._rows = ImageRows(source, *self._columns) if delivers_images(source) else None
        self._used_up = False
        self._named: set[str] = set()
        self._with_fingerprint = fingerprint
        self._pass = _Pass()
        self.broken: list[str] = []
        self.num_images = num_images(source) if self._rows is None else len(self._rows)
        if self._rows is not None:
            self._collate.check_image_processor()

    def enlarged(self, scale: float) -> ImageBatches | None:
        """The same batches of the same images, `scale` times as large on each side.

        Returns:
            None where the source gives tensors or can be read but once, or the image processor has no sizes.
        """
        processor = None if self._rows is None else enlarged_processor(self._collate.image_processor, scale)
        if processor is None:
            return None
        enlarged = copy.copy(self)
        # The eight bits that images have fit into float16.
        enlarged._collate = dataclasses.replace(self._collate, image_processor=processor, dtype=torch.float16)
        enlarged._with_fingerprint = enlarged._pin_memory = False
        enlarged._pass, enlarged.broken = _Pass(), []
        return enlarged

    @property
    def num_own_images(self) -> int | None:
        """Images of this process, broken ones included; None if it cannot be known beforehand."""
        if self.num_images is None or self._processes.is_single:
            return self.num_images
        # Only a source of single images is cut into batches of one size here.
        return None if self._rows is None else min(self.num_images, len(self) * self._batch_size)

    @property
    def num_broken(self) -> int:
        """Images that could not be decoded in the last pass."""
        return len(self.broken)

    def __len__(self) -> int:
        """Number of batches of this process if no image is broken.

        Raises:
            TypeError: if it cannot be known beforehand, as for a generator.
        """
        if self._rows is not None:
            batches = math.ceil(len(self._rows) / self._batch_size)
        elif isinstance(self._source, DataLoader) and self._source.batch_size is not None:
            batches = len(self._source)
        else:
            raise TypeError(f"A {type(self._source).__name__} of `pixel_values` does not tell its number of batches.")
        return len(range(self._processes.index, batches, self._processes.count))

    def __iter__(self) -> Iterator[Batch]:
        self._pass, self.broken = _Pass(), []
        for index, batch, broken in self._batches():
            self._leave_out(broken, index)
            if self._rows is not None:
                self._check_broken_share(len(self._rows))
            if batch is None or batch.num_images == 0:
                continue
            self._pass.take_in(batch.pixel_values)
            if self._with_fingerprint:
                self._pass.fingerprint.update(batch.pixel_values, index)
            yield dataclasses.replace(batch, index=index)
        if self._processes.is_single:
            self._check()

    @property
    def fingerprint(self) -> str:
        """Of the usable images of the last pass; see `ImageFingerprint`."""
        return self._pass.fingerprint.hexdigest()

    def source_fingerprint(self) -> str | None:
        """Of the images as they lie on the disk, in their order; None where that cannot be known before a pass."""
        return None if self._rows is None else fingerprint_content(self._rows)

    def merge_across_processes(self) -> None:
        """Bring together what all processes found in a pass; every one calls this after its own.

        Raises:
            ValueError: what iterating in one process raises, and if the processes did not get the same images in the
                same order.
        """
        if self._processes.is_single:
            return
        found = self._processes.gather(self._pass)
        if len({each.source for each in found}) > 1:
            raise ValueError(
                "The processes were given different images, or the same in different orders, so that they cannot be "
                "shared out. Give every process the same dataset, list or DataLoader in the same order: sort names of "
                "files, and shuffle or transform at random with the same seed everywhere, or not at all."
            )
        self._pass = found[0]
        for each in found[1:]:
            self._pass.merge(each)
        self.broken = [error.name for _, error in sorted(self._pass.broken, key=lambda pair: pair[0])]
        for _, error in self._pass.broken:
            self._name(error)
        self._check()

    def _batches(self) -> Iterator[Loaded]:
        """Batches of this process with their numbers, and the broken images among them."""
        if self._rows is not None:
            return self._load(self._rows)
        rows = None if self._processes.is_single else single_rows(self._source, *self._columns)
        return self._stream() if rows is None else self._load(rows)

    def _load(self, rows: Sequence[Row]) -> Iterator[Loaded]:
        starts = range(0, len(rows), self._batch_size)
        own = [index for index in range(len(starts)) if self._processes.owns(index)]
        # What a dataset of the user's own delivers may be random, as its transforms may be: its length has to do.
        look = rows is self._rows and not self._processes.is_single
        self._pass.source = (len(rows), fingerprint_rows([rows[0], rows[len(rows) - 1]] if look else []))
        loader = DataLoader(
            rows,  # a sequence serves as a map-style dataset
            batch_sampler=[range(starts[i], min(starts[i] + self._batch_size, len(rows))) for i in own],
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            collate_fn=ErrorsReturned(self._collate),
        )
        for index, loaded in zip(own, loader, strict=True):
            if isinstance(loaded, Exception):
                raise loaded
            yield index, *loaded

    def _stream(self) -> Iterator[Loaded]:
        if isinstance(self._source, Iterator):
            if self._used_up:
                raise ValueError(
                    f"The {type(self._source).__name__} was used up by an earlier pass; give a list or a DataLoader, "
                    "which can be iterated again."
                )
            self._used_up = True
        first = ""
        index = -1
        for index, rows in enumerate(self._row_batches()):
            if index == 0 and not self._processes.is_single:
                first = fingerprint_rows(rows)
            if self._processes.owns(index):
                yield index, *self._collate(rows)
        self._pass.source = (index + 1, first)

    def _row_batches(self) -> Iterator[list[Row]]:
        single: list[Row] = []
        for row in stream_rows(self._source, *self._columns):
            if single and (row.is_batch or len(single) == self._batch_size):
                yield single
                single = []
            if row.is_batch:
                yield [row]
            else:
                single.append(row)
        if single:
            yield single

    def _leave_out(self, broken: Iterable[BrokenImageError], index: int) -> None:
        for error in broken:
            self.broken.append(error.name)
            self._pass.broken.append((index, error))
            self._name(error)

    def _name(self, error: BrokenImageError) -> None:
        if error.name not in self._named:  # once, however many passes there are
            self._named.add(error.name)
            logger.warning(f"Broken image left out: {error}")

    def _check(self) -> None:
        self._check_broken_share(self._pass.usable + self.num_broken)
        if not self._pass.usable:
            raise ValueError(
                f"There is no image to use ({self.num_broken} broken ones were left out); check the source of images."
            )

    def _check_broken_share(self, total: int) -> None:
        # A quotient, not a product with the share: 0.29 * 100 < 29.
        if self.num_broken and self.num_broken / total > self._max_broken_share:
            raise ValueError(
                f"At least {self.num_broken} of {total} images ({self.num_broken / total:.1%}) cannot be decoded, more "
                f"than max_broken_share={self._max_broken_share} tolerates. The first are {', '.join(self.broken[:3])}. "
                "Mend or remove them, or raise max_broken_share."
            )


@dataclasses.dataclass
class _Pass:
    """What a pass has found in the batches of one process, or of several.

    Attributes:
        usable: Images.
        broken: With the numbers of their batches.
        shape: Of an image, `(channels, height, width)`.
        source: Size of the source and fingerprint of its first rows, which are the same for all processes.
        fingerprint: Of the usable images.
    """

    usable: int = 0
    broken: list[tuple[int, BrokenImageError]] = dataclasses.field(default_factory=list)
    shape: torch.Size | None = None
    source: tuple[int, str] = (0, "")
    fingerprint: ImageFingerprint = dataclasses.field(default_factory=ImageFingerprint)

    def take_in(self, pixel_values: Tensor) -> None:
        self._check_shape(pixel_values.shape[1:])
        self.usable += len(pixel_values)

    def merge(self, other: _Pass) -> None:
        if other.shape is not None:
            self._check_shape(other.shape)
        self.usable += other.usable
        self.broken += other.broken
        self.fingerprint.merge(other.fingerprint)

    def _check_shape(self, shape: torch.Size) -> None:
        if self.shape is not None and self.shape != shape:
            raise ValueError(
                f"Images of different sizes: {list(self.shape)} and {list(shape)}; let the image processor resize and "
                "crop them to one size."
            )
        self.shape = shape


def _check_whole(source: Any) -> None:
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    if isinstance(source, DataLoaderShard | DataLoaderDispatcher):
        raise ValueError(
            f"The {type(source).__name__} shares its batches out over the processes already, and may repeat images to "
            "fill the last batch; give the DataLoader as it was before `accelerator.prepare`."
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
