"""One form for whatever a source of images delivers: rows, each with an undecoded image or with `pixel_values`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from ...runtime.distributed import Processes
from ...runtime.formatting import type_of
from ...runtime.inputs import MAIN_NAMES, PIXELS, ModelInputs
from .decoding import encoded_image, holds_image, image_name
from .files import open_file
from .sources import drawn_indices, find_image_column, load_image_dataset


@dataclass(frozen=True)
class Row:
    """An undecoded image, or the inputs of a model for one image or a batch: `pixel_values` and whatever goes with them.

    The label is that of the image, or labels `[batch]`; the name is for messages.
    """

    name: str
    image: Any = None
    inputs: Mapping[str, Tensor] | None = None
    label: Any = None

    @property
    def is_batch(self) -> bool:
        """Whether the row is a batch of images."""
        if self.inputs is None:
            return False
        pixels = self.inputs.get(PIXELS)
        # Three dimensions are an image, or a batch of patches, whose masks have as many entries.
        others = [each for name, each in self.inputs.items() if name != PIXELS and each.ndim]
        return pixels is None or pixels.ndim != 3 or any(len(each) == len(pixels) for each in others)


class _IndexedRows(Sequence[Row]):
    """Rows of a source with random access; reading one decodes nothing."""

    def __init__(self, source: Any, *columns: str | None) -> None:
        self._source = source
        self._columns = columns

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return read_row(self._source[index], index, *self._columns)


def check_source(source: Any, processes: Processes) -> None:
    """Raise a TypeError if a source cannot deliver images, a ValueError if it distributes its batches already."""
    kind = type(source).__name__
    is_one_item = isinstance(source, bytes | Mapping)
    if isinstance(source, Tensor):
        kind = f"tensor of shape {list(source.shape)}"
        is_one_item = source.ndim != 4
    if is_one_item or not isinstance(source, Iterable | torch.utils.data.Dataset):
        raise TypeError(
            f"A {kind} is not a source of images; give a dataset, a folder, a Hub id, a list of images, or an iterable "
            "of batches of `pixel_values` (a single batch goes into a list)."
        )
    if not processes.is_single:
        from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

        if isinstance(source, DataLoaderShard | DataLoaderDispatcher):
            raise ValueError(
                f"The {kind} shares its batches out over the processes already, and may repeat images to fill the last "
                "batch; give the DataLoader as it was before `accelerator.prepare`."
            )


def image_rows(source: Any, image_column: str | None, label_column: str | None) -> Sequence[Row] | None:
    """Return the rows of a dataset or a list of undecoded images; None for any other source."""
    if isinstance(source, datasets.Dataset):
        # A transform may deliver anything.
        if source.format["type"] == "custom" or set(MAIN_NAMES) & set(source.column_names):
            return None
        source = load_image_dataset(source, image_column=image_column).with_format(None)
        image_column = find_image_column(source.features, image_column)
        if label_column is not None and label_column not in source.column_names:
            raise ValueError(
                f"label_column={label_column!r} does not exist; the columns are {', '.join(source.column_names)}."
            )
        source = _needed_columns(source, image_column, label_column)
    elif not isinstance(source, Sequence) or len(source) == 0 or not holds_image(source[0]):
        return None
    return _IndexedRows(source, image_column, label_column)


def single_rows(source: Any, image_column: str | None, label_column: str | None) -> Sequence[Row] | None:
    """Return the rows of a source with random access if its first item is a single image; None otherwise.

    Several processes each read only their own rows of such a source; one process reads it from beginning to end.
    """
    source = _as_tensors(source)
    if isinstance(source, IterableDataset) or not _has_random_access(source):
        return None
    if len(source) == 0 or read_row(source[0], 0, image_column, label_column).is_batch:
        return None
    return _IndexedRows(source, image_column, label_column)


def draw_images(source: Any, num_samples: int | None, seed: int = 42) -> Any:
    """Draw images without replacement, in the order of the source, from anything with a length and random access.

    Args:
        source: A `datasets.Dataset`, a list, a tensor or a PyTorch dataset.
        num_samples: Number of images to draw; None for all.
        seed: Seed of the draw.

    Raises:
        ValueError: for batches, and for a source that can only be read from beginning to end.
    """
    if num_samples is None:
        return source
    if not _has_random_access(source) or (
        isinstance(source, Sequence) and len(source) and read_row(source[0], 0).is_batch
    ):
        raise ValueError(
            f"num_samples={num_samples} cannot be drawn from {type_of(source)} of batches or without a length; "
            "leave it out, or give a dataset or a list of images."
        )
    drawn = drawn_indices(len(source), num_samples, seed)
    if isinstance(source, datasets.Dataset):
        return source.select(drawn)
    if isinstance(source, Tensor):
        return source[torch.from_numpy(drawn).to(source.device)]
    return [source[index] for index in drawn] if isinstance(source, Sequence) else Subset(source, drawn.tolist())


def _has_random_access(source: Any) -> bool:
    is_map_style = isinstance(source, torch.utils.data.Dataset) and hasattr(source, "__len__")
    return is_map_style or isinstance(source, datasets.Dataset | Sequence | Tensor)


def _as_tensors(source: Any) -> Any:
    is_plain = isinstance(source, datasets.Dataset) and source.format["type"] != "custom"
    return source.with_format("torch") if is_plain else source


def fingerprint_rows(rows: Sequence[Row]) -> str:
    """Return a fingerprint of a few rows that tells apart sources and their orders; nothing is decoded."""
    digest = hashlib.sha256()
    for row in rows:
        # Only the name, since the folder may be elsewhere on another machine.
        digest.update(PurePath(row.name).name.encode())
        digest.update(_content(row) or b"")
    return digest.hexdigest()


def fingerprint_content(rows: Sequence[Row]) -> str | None:
    """Return a fingerprint of every byte of encoded images, in their order; None for PIL images, which have none."""
    digest = hashlib.sha256()
    for row in rows:
        content = _content(row)
        if content is None:
            return None
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _content(row: Row) -> bytes | None:
    """Return pixels or the encoded image as bytes; None for a PIL image."""
    item = row.image
    if row.inputs is not None:
        item = b"".join(each.detach().cpu().double().numpy().tobytes() for _, each in sorted(row.inputs.items()))
    item = encoded_image(item)
    if isinstance(item, Image.Image):
        return None
    if isinstance(item, str | PathLike):
        try:
            with open_file(item) as file:
                return file.read()
        except (OSError, ValueError):
            item = None  # a broken image, which is reported when it is decoded
    return b"" if item is None else bytes(item)


def stream_rows(source: Any, image_column: str | None, label_column: str | None) -> Iterator[Row]:
    """Yield the rows of any iterable, or of a PyTorch dataset."""
    source = _as_tensors(source)
    if isinstance(source, datasets.IterableDataset) and source.features and not set(MAIN_NAMES) & set(source.features):
        image_column = find_image_column(source.features, image_column)
        source = _needed_columns(source, image_column, label_column)
        source = source.cast_column(image_column, datasets.Image(decode=False))
    # A PyTorch dataset need not be iterable, nor end by itself.
    indexed = isinstance(source, torch.utils.data.Dataset) and not isinstance(source, IterableDataset)
    items = (source[index] for index in range(len(source))) if indexed else source
    for index, item in enumerate(items):
        yield read_row(item, index, image_column, label_column)


def _needed_columns(source: Any, *columns: str | None) -> Any:
    """Leave out all other columns, whose images `datasets` would decode: they may be broken, or execute something."""
    return source.select_columns([name for name in dict.fromkeys(columns) if name in source.features])


def read_row(item: Any, index: int, image_column: str | None = None, label_column: str | None = None) -> Row:
    """Find the image or `pixel_values`, and the label, in an item: one of these, a pair with labels, or a mapping.

    Without `label_column`, labels are class indices beside `pixel_values`: `labels`, or the second item of a pair. The
    index is the item's number, for messages. A missing column or label is a ValueError, any other item a TypeError.
    """
    name, label = f"item {index}", None
    named = {"image_column": image_column, "label_column": label_column}
    if not isinstance(item, Mapping) and any(named.values()):
        option, value = next((option, value) for option, value in named.items() if value)
        raise ValueError(
            f"{option}={value!r} needs items with columns, but {name} is {type_of(item)}; leave it out, or give a "
            "dataset."
        )
    if isinstance(item, tuple | list):
        if not 1 <= len(item) <= 2:
            raise TypeError(f"{name} is {type_of(item)} of {len(item)}; give images, or pairs with labels.")
        item, label = item[0], _class_indices(item[1]) if len(item) == 2 else None
    elif isinstance(item, Mapping) and (image_column in item or not holds_image(item)):
        main = None if image_column is not None else next((each for each in MAIN_NAMES if each in item), None)
        key = main or _image_key(item, image_column, name)
        if label_column is not None:
            label = _required_label(item, label_column, name)
        elif main is not None:
            label = _class_indices(item.get("labels"))
        if main is not None:
            return Row(name, inputs=_inputs(item, main, name), label=label)
        item = item[key]
    if isinstance(item, Tensor) or (isinstance(item, np.ndarray) and not holds_image(item)):
        return Row(name, inputs={PIXELS: _tensor(item, name)}, label=label)
    return Row(image_name(item) or name, image=item, label=label)


def num_images(source: Any) -> int | None:
    """Return the number of images in a source of `pixel_values`; None if it cannot be known in advance."""
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
        rows = [read_row(item, index) for index, item in enumerate(source)]
        return sum(len(ModelInputs(row.inputs)) if row.is_batch and row.inputs is not None else 1 for row in rows)
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
    """Return labels if they are class indices; None for masks and boxes, which other tasks call labels too."""
    if isinstance(labels, int):
        return labels
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if array.ndim <= 1 and np.issubdtype(array.dtype, np.integer) else None


def _inputs(item: Mapping[str, Any], main: str, name: str) -> dict[str, Tensor]:
    """Return the main input of an item and all tensors beside it that are not labels."""
    found = {main: _tensor(item[main], name)}
    for key, value in item.items():
        if key != main and not key.endswith("labels") and isinstance(value, Tensor | np.ndarray):
            found[key] = torch.as_tensor(value)
    return found


def _tensor(values: Any, name: str) -> Tensor:
    try:
        if isinstance(values, list | tuple):
            return torch.stack([torch.as_tensor(value) for value in values])
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The `pixel_values` of {name} are not a tensor [batch, channels, height, width] ({error}); let the image "
            "processor resize all images to one size."
        ) from error
