"""Batches of images, ready for a model, from whatever a user holds."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.inputs import PIXELS, ModelInputs
from ...runtime.logging import get_logger
from ..fingerprint import ImageFingerprint
from .collating import Batch, Collator, different_sizes
from .decoding import BrokenImageError
from .high_resolution import enlarged_processor
from .rows import (
    Row,
    check_source,
    fingerprint_content,
    fingerprint_rows,
    image_rows,
    num_images,
    read_row,
    single_rows,
    stream_rows,
)
from .sources import load_image_dataset


logger = get_logger(__name__)

NumberedBatch = tuple[int, Batch | None, list[BrokenImageError]]

__all__ = ["Batch", "ImageBatches"]


class ImageBatches:
    """Iterates over images in batches, in the order of the source; broken files are logged, left out and counted.

    Batches are distributed over processes: number b goes to process b modulo their number, and a process decodes no
    other. Batches are the same for any number of processes. After a pass all of them call `merge_across_processes`.

    Args:
        source: A `datasets.Dataset` with an image column, a folder, a Hub id, a list of PIL images or paths, or any
            iterable (such as a `DataLoader`) of images or of `pixel_values`: tensors `[batch, channels, height, width]`
            or `[channels, height, width]`, pairs of tensors and labels, or mappings with `pixel_values`.
        image_processor: The model's; not needed if the source gives `pixel_values`.
        batch_size: Images per batch; batches of `pixel_values` stay as they are.
        image_column: Column with images; default: the only one.
        label_column: Column to deliver as `labels`; default: only labels that come with `pixel_values` are delivered.
        label_map: Model label by dataset label, if they differ.
        max_broken_share: Tolerated share of images that cannot be decoded, in [0, 1].
        max_image_pixels: Most pixels of an encoded image, a larger one is broken; default: `PIL.Image.MAX_IMAGE_PIXELS`.
        num_channels: Channels that the model takes; 1 converts to grey.
        num_workers: Processes that read and decode ahead, for datasets and lists of images.
        pin_memory: Whether to put the pixels in pinned memory, from which a GPU copies them while it computes.
        dtype: The dtype of the pixels.
        processes: The processes among which the batches are distributed.
        fingerprint: Whether to compute the fingerprint of the images.
        input_names: Names of the inputs that the model takes; all else that a source or the image processor gives is
            left out.

    Attributes:
        num_images: Number of images in the source, including broken ones; None if it cannot be known in advance.

    Raises:
        TypeError: for a source of another kind.
        ValueError: for a missing image processor, image column or label column, a negative number of workers, and for a
            DataLoader that distributes its batches already. While iterating: for more broken images than tolerated, no
            usable image, images of different sizes or unusable `pixel_values`, and for the second pass through an
            iterator.
        RuntimeError: while iterating, from PyTorch, if a worker dies.
    """

    # These are the independent properties of a source, its decoding and its distribution; any grouping of them would
    # only move the arguments into objects that every caller has to build.
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
        max_image_pixels: int | None = None,
        num_channels: int = 3,
        num_workers: int = 0,
        pin_memory: bool = False,
        dtype: torch.dtype = torch.float32,
        processes: Processes = SINGLE_PROCESS,
        fingerprint: bool = False,
        input_names: frozenset[str] = frozenset({PIXELS}),
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is not a positive number of images.")
        if not isinstance(num_workers, int) or num_workers < 0:
            raise ValueError(f"num_workers={num_workers!r} is negative or not an integer; 0 decodes in this process.")
        if not isinstance(max_broken_share, int | float) or not 0 <= max_broken_share <= 1:
            raise ValueError(f"max_broken_share={max_broken_share!r} is not in [0, 1].")
        if max_image_pixels is not None and (not isinstance(max_image_pixels, int) or max_image_pixels < 1):
            raise ValueError(f"max_image_pixels={max_image_pixels!r} is not a positive number of pixels.")
        if isinstance(source, str | Path | datasets.DatasetDict):
            source = load_image_dataset(source, image_column=image_column)
        check_source(source, processes)
        self._source = source
        self._kind = type(source).__name__
        self._processes = processes
        self._collate = Collator(image_processor, num_channels, label_map, dtype, max_image_pixels, input_names)
        self._batch_size = batch_size
        self._columns = (image_column, label_column)
        self._max_broken_share = max_broken_share
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._rows = image_rows(source, *self._columns)
        self._used_up = False
        self._logged: set[str] = set()
        self._with_fingerprint = fingerprint
        self._pass = _Pass()
        self.num_images = num_images(source) if self._rows is None else len(self._rows)
        if self._rows is not None:
            self._collate.check_image_processor()

    def first(self, count: int = 1) -> ModelInputs | None:
        """Return the inputs of the first usable images, without reading further; None if there are none.

        A source that can be read only once loses nothing.
        """
        with torch.random.fork_rng([]):
            rows = self._first_rows()
        for start in range(0, len(rows), count):
            found = self._collate.or_error(rows[start : start + count])
            if not isinstance(found, Exception) and found[0] is not None:
                return found[0].inputs.ordinary()[:count]
        return None

    def _first_rows(self) -> list[Row]:
        if self._rows is not None:
            return [self._rows[index] for index in range(min(len(self._rows), self._batch_size))]
        if isinstance(self._source, Iterator):
            if self._used_up:
                return []
            item = next(self._source, None)
            if item is None:
                return []
            self._source = itertools.chain([item], self._source)
            return [read_row(item, 0, *self._columns)]
        return list(itertools.islice(stream_rows(self._source, *self._columns), 1))

    def enlarged(self, scale: float) -> ImageBatches | None:
        """Return the same batches of the same images, `scale` times as large on each side.

        Returns None if the source gives tensors or can be read only once, or the image processor has no sizes.
        """
        processor = None if self._rows is None else enlarged_processor(self._collate.image_processor, scale)
        if processor is None:
            return None
        enlarged = copy.copy(self)
        # The eight bits of an image fit into float16.
        enlarged._collate = dataclasses.replace(self._collate, image_processor=processor, dtype=torch.float16)
        enlarged._with_fingerprint = enlarged._pin_memory = False
        enlarged._pass = _Pass()
        return enlarged

    @property
    def is_in_memory(self) -> bool:
        """Whether the source is a tensor or a list of tensors."""
        return self._rows is None and isinstance(self._source, list | tuple | torch.Tensor)

    @property
    def num_own_images(self) -> int | None:
        """Number of images of this process, including broken ones; None if it cannot be known in advance."""
        if self.num_images is None or self._processes.is_single:
            return self.num_images
        # Only a source of single images is divided into batches of equal size here.
        return None if self._rows is None else min(self.num_images, len(self) * self._batch_size)

    @property
    def broken(self) -> list[str]:
        """Names of the images that could not be decoded in the last pass; once merged, in all processes."""
        return [error.name for _, error in sorted(self._pass.broken, key=itemgetter(0))]

    def __len__(self) -> int:
        """Return the number of batches of this process if no image is broken; a TypeError if it is not known yet."""
        if self._rows is not None:
            batches = math.ceil(len(self._rows) / self._batch_size)
        elif isinstance(self._source, DataLoader) and self._source.batch_size is not None:
            batches = len(self._source)
        else:
            raise TypeError(f"A {self._kind} of `pixel_values` does not tell its number of batches.")
        return len(range(self._processes.index, batches, self._processes.count))

    def __iter__(self) -> Iterator[Batch]:
        self._pass = _Pass()
        for index, batch, broken in self._batches():
            self._pass.broken += [(index, error) for error in broken]
            self._log(broken)
            if self._rows is not None:
                self._check_broken_share(len(self._rows))
            if batch is None or batch.num_images == 0:
                continue
            # No gradients can be computed with respect to what was made inside `torch.inference_mode()`.
            batch = dataclasses.replace(batch, inputs=batch.inputs.ordinary())
            if batch.inputs.is_images:
                self._pass.check_shape(batch.pixel_values.shape[1:])
            self._pass.usable += batch.num_images
            if self._with_fingerprint:
                self._pass.fingerprint.update(batch.inputs, index)
            yield dataclasses.replace(batch, index=index)
        if self._processes.is_single:
            self._check_pass()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the usable images of the last pass; see `ImageFingerprint`."""
        return self._pass.fingerprint.hexdigest()

    def source_fingerprint(self) -> str | None:
        """Return the fingerprint of the encoded images in their order; None if it cannot be known before a pass."""
        return None if self._rows is None else fingerprint_content(self._rows)

    def read_through(self) -> None:
        """Read all images once in all processes, without keeping them, for their fingerprint."""
        with self._processes.raise_on_all_ranks():
            for _ in logging.tqdm(self, desc="Comparing images", unit="batch"):
                pass
        self.merge_across_processes()

    def merge_across_processes(self) -> None:
        """Merge what all processes found in a pass; each of them calls this after its own.

        Raises:
            ValueError: what iterating in one process raises, and if the processes did not get the same images in the
                same order.
        """
        if self._processes.is_single:
            return
        found = self._processes.gather(self._pass)
        if len({each.source for each in found}) > 1:
            raise ValueError(
                "The processes were given different images, or the same in different orders. Give every process the "
                "same dataset, list or DataLoader in the same order: sort names of files, and shuffle or transform at "
                "random with the same seed everywhere, or not at all."
            )
        self._pass = found[0]
        for each in found[1:]:
            self._pass.merge(each)
        self._log([error for _, error in self._pass.broken])
        self._check_pass()

    def _batches(self) -> Iterator[NumberedBatch]:
        """Yield the batches of this process with their numbers, and the broken images among them."""
        if self._rows is not None:
            return self._load(self._rows)
        rows = None if self._processes.is_single else single_rows(self._source, *self._columns)
        return self._stream() if rows is None else self._load(rows)

    def _load(self, rows: Sequence[Row]) -> Iterator[NumberedBatch]:
        starts = range(0, len(rows), self._batch_size)
        own = [index for index in range(len(starts)) if self._processes.owns(index)]
        # Rows of a user's own dataset may be random, as its transforms may be; only their number is compared.
        compare = rows is self._rows and not self._processes.is_single
        self._pass.source = (len(rows), fingerprint_rows([rows[0], rows[len(rows) - 1]] if compare else []))
        loader = DataLoader(
            rows,  # a sequence serves as a map-style dataset
            batch_sampler=[range(starts[i], min(starts[i] + self._batch_size, len(rows))) for i in own],
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            collate_fn=self._collate.or_error,
        )
        for index, loaded in zip(own, loader, strict=True):
            if isinstance(loaded, Exception):
                raise loaded
            yield index, *loaded

    def _stream(self) -> Iterator[NumberedBatch]:
        if isinstance(self._source, Iterator):
            if self._used_up:
                raise ValueError(
                    f"The {self._kind} was used up by an earlier pass; give a list or a DataLoader, "
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

    def _log(self, broken: Sequence[BrokenImageError]) -> None:
        """Log broken images, each of them once, however many passes there are."""
        for error in broken:
            if error.name not in self._logged:
                self._logged.add(error.name)
                logger.warning(f"Broken image left out: {error}")

    def _check_pass(self) -> None:
        self._check_broken_share(self._pass.usable + len(self._pass.broken))
        if not self._pass.usable:
            raise ValueError(
                f"There are no images to use ({len(self._pass.broken)} broken ones were left out); check the source of "
                "images."
            )

    def _check_broken_share(self, total: int) -> None:
        broken = len(self._pass.broken)
        # A quotient, since 0.29 * 100 < 29.
        if broken and broken / total > self._max_broken_share:
            _, first = min(self._pass.broken, key=itemgetter(0))
            raise ValueError(
                f"At least {broken} of {total} images ({broken / total:.1%}) cannot be decoded, more than "
                f"max_broken_share={self._max_broken_share} tolerates. The first are {', '.join(self.broken[:3])}; the "
                f"reason for the first: {first.reason}. Repair or remove them, or raise max_broken_share."
            )


@dataclasses.dataclass
class _Pass:
    """What a pass has found in the batches of one process or, once merged, of all.

    `broken` has the numbers of batches; `source` is the size of the source and the fingerprint of some of its rows.
    """

    usable: int = 0
    broken: list[tuple[int, BrokenImageError]] = dataclasses.field(default_factory=list)
    shape: torch.Size | None = None  # (channels, height, width)
    source: tuple[int, str] = (0, "")
    fingerprint: ImageFingerprint = dataclasses.field(default_factory=ImageFingerprint)

    def merge(self, other: _Pass) -> None:
        if other.shape is not None:
            self.check_shape(other.shape)
        self.usable += other.usable
        self.broken += other.broken
        self.fingerprint.merge(other.fingerprint)

    def check_shape(self, shape: torch.Size) -> None:
        if self.shape is not None and self.shape != shape:
            raise different_sizes([self.shape, shape])
        self.shape = shape
