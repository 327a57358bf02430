"""One form for whatever a source of images delivers: rows, each with an undecoded image or with `pixel_values`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .decoding import holds_image, image_name
from .sources import find_image_column, load_image_dataset


@dataclass(frozen=True)
class Row:
    """An image, or a batch of `pixel_values`.

    Attributes:
        name: For messages.
        image: Undecoded image; unused if there are `pixel_values`.
        pixel_values: `[channels, height, width]` or `[batch, channels, height, width]`, or None.
        label: Label, or labels `[batch]`, or None.
    """

    name: str
    image: Any = None
    pixel_values: Tensor | None = None
    label: Any = None

    @property
    def is_batch(self) -> bool:
        """Whether this is a batch already."""
        return self.pixel_values is not None and self.pixel_values.ndim != 3


class ImageRows(Sequence[Row]):
    """Rows of a dataset, or of a list of images; reading one decodes nothing."""

    def __init__(self, source: Any, image_column: str | None = None, label_column: str | None = None) -> None:
        if isinstance(source, datasets.Dataset):
            source = load_image_dataset(source, image_column=image_column).with_format(None)
            image_column = find_image_column(source.features, image_column)
            if label_column is not None and label_column not in source.column_names:
                raise ValueError(
                    f"label_column={label_column!r} does not exist; the columns are {', '.join(source.column_names)}."
                )
        self._source = source
        self._image_column = image_column
        self._label_column = label_column

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return read_row(self._source[index], index, self._image_column, self._label_column)


def delivers_images(source: Any) -> bool:
    """Whether a source of known length and random access holds undecoded images."""
    if isinstance(source, datasets.Dataset):
        # A transform may deliver anything.
        return source.format["type"] != "custom" and "pixel_values" not in source.column_names
    return isinstance(source, Sequence) and len(source) > 0 and holds_image(source[0])


def single_rows(source: Any, image_column: str | None = None, label_column: str | None = None) -> Sequence[Row] | None:
    """Rows of a source with random access, if its first item is one image; None otherwise.

    One process reads such a source from the beginning to the end; several each read their own rows alone.
    """
    if isinstance(source, datasets.Dataset) and source.format["type"] != "custom":
        source = source.with_format("torch")
    is_map_style = isinstance(source, torch.utils.data.Dataset) and hasattr(source, "__len__")
    if isinstance(source, torch.utils.data.IterableDataset) or not (
        isinstance(source, datasets.Dataset | Sequence | Tensor) or is_map_style
    ):
        return None
    if len(source) == 0 or read_row(source[0], 0, image_column, label_column).is_batch:
        return None
    return _IndexedRows(source, image_column, label_column)


class _IndexedRows(Sequence[Row]):
    def __init__(self, source: Any, *columns: str | None) -> None:
        self._source = source
        self._columns = columns

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return read_row(self._source[index], index, *self._columns)


def fingerprint_rows(rows: Sequence[Row]) -> str:
    """A fingerprint that tells sources and their orders apart, from a few rows; nothing is decoded."""
    digest = hashlib.sha256()
    for row in rows:
        # Folders may lie elsewhere on another machine.
        digest.update(PurePath(row.name).name.encode())
        item = row.image.get("bytes") if isinstance(row.image, Mapping) else row.image
        if row.pixel_values is not None:
            item = row.pixel_values.detach().cpu().double().numpy()
        if isinstance(item, bytes | bytearray | np.ndarray):
            digest.update(bytes(item))
    return digest.hexdigest()


def fingerprint_content(rows: Sequence[Row]) -> str | None:
    """A fingerprint of encoded images and their order, from every byte of them; nothing is decoded.

    None where images have no encoded form: they are pictures in memory.
    """
    digest = hashlib.sha256()
    for row in rows:
        item = row.image
        if isinstance(item, Mapping):
            item = item["bytes"] if item.get("bytes") is not None else item.get("path")
        if isinstance(item, Image.Image):
            return None
        if isinstance(item, str | PathLike):
            try:
                item = Path(item).expanduser().read_bytes()
            except OSError:
                item = None  # a broken image, of which decoding will say so
        digest.update(hashlib.sha256(b"" if item is None else bytes(item)).digest())
    return digest.hexdigest()


def stream_rows(source: Any, image_column: str | None = None, label_column: str | None = None) -> Iterator[Row]:
    """Rows of any iterable, or of a PyTorch dataset."""
    if isinstance(source, datasets.Dataset) and source.format["type"] != "custom":
        source = source.with_format("torch")
    if isinstance(source, datasets.IterableDataset) and source.features and "pixel_values" not in source.features:
        image_column = find_image_column(source.features, image_column)
        source = source.cast_column(image_column, datasets.Image(decode=False))
    # A PyTorch dataset need not be iterable, nor end by itself.
    indexed = isinstance(source, torch.utils.data.Dataset) and not isinstance(source, torch.utils.data.IterableDataset)
    items = (source[index] for index in range(len(source))) if indexed else source
    for index, item in enumerate(items):
        yield read_row(item, index, image_column, label_column)


def read_row(item: Any, index: int, image_column: str | None, label_column: str | None) -> Row:
    """Find image or `pixel_values`, and label, in an item.

    Args:
        item: An image, `pixel_values`, a pair of either with labels, or a mapping by column.
        index: Its number, for messages.
        image_column: Default: the one image column there is.
        label_column: Default: where class indices stand beside `pixel_values`, as `labels` or second of a pair, they.

    Raises:
        ValueError: for a missing column or label.
        TypeError: for anything else.
    """
    name, label = f"item {index}", None
    if isinstance(item, tuple | list):
        if not 1 <= len(item) <= 2:
            raise TypeError(f"{name} is a {type(item).__name__} of {len(item)}; give images, or pairs with labels.")
        item, label = item[0], _class_indices(item[1]) if len(item) == 2 else None
    elif isinstance(item, Mapping) and not holds_image(item):
        has_pixels = image_column is None and "pixel_values" in item
        key = "pixel_values" if has_pixels else _image_key(item, image_column, name)
        if label_column is not None:
            label = _required_label(item, label_column, name)
        elif has_pixels:
            label = _class_indices(item.get("labels"))
        item = _tensor(item[key], name) if has_pixels else item[key]
    if isinstance(item, Tensor) or (isinstance(item, np.ndarray) and not holds_image(item)):
        return Row(name, pixel_values=_tensor(item, name), label=label)
    return Row(image_name(item) or name, image=item, label=label)


def num_images(source: Any) -> int | None:
    """How many images a source of `pixel_values` will deliver, where that can be known beforehand."""
    if isinstance(source, Tensor | datasets.Dataset):
        return len(source)
    if isinstance(source, DataLoader):
        if source.batch_size is None and source.batch_sampler is not None:
            return None  # a batch sampler of the user's own
        try:
            return len(source) * source.batch_size if source.drop_last else len(source.sampler)
        except TypeError:  # a stream
            return None
    if isinstance(source, list | tuple):
        rows = [read_row(item, index, None, None) for index, item in enumerate(source)]
        return sum(len(row.pixel_values) if row.is_batch and row.pixel_values is not None else 1 for row in rows)
    return None


def _image_key(item: Mapping[str, Any], image_column: str | None, name: str) -> str:
    try:
        return find_image_column(item, image_column)
    except ValueError as error:
        if image_column is not None:
            raise
        raise ValueError(f"A batch has no `pixel_values` ({name}), nor can an image be found in it: {error}") from None


def _required_label(item: Mapping[str, Any], label_column: str, name: str) -> Any:
    if label_column not in item:
        columns = ", ".join(map(str, item))
        raise ValueError(f"label_column={label_column!r} does not exist in {name}; the columns are {columns}.")
    if item[label_column] is None:
        raise ValueError(f"{name} has no label in column {label_column!r}; leave out images without a class.")
    return item[label_column]


def _class_indices(labels: Any) -> Any:
    """Labels, if they are classes; masks and boxes, which other tasks call labels too, are of no use here."""
    if isinstance(labels, int):
        return labels
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if array.ndim <= 1 and np.issubdtype(array.dtype, np.integer) else None


def _tensor(values: Any, name: str) -> Tensor:
    try:
        if isinstance(values, list | tuple):
            return torch.stack([torch.as_tensor(value) for value in values])
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The `pixel_values` of {name} are no tensor [batch, channels, height, width] ({error}); let the image "
            "processor resize all images to one size."
        ) from error
