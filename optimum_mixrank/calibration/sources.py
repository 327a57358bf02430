"""Find images: local folders and files, the Hub, or a dataset that is there already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)

_COLUMN_NAMES = ("image", "img", "images", "picture", "photo")


def load_image_dataset(
    source: str | Path | datasets.Dataset | datasets.DatasetDict,
    *,
    split: str | None = None,
    default_splits: tuple[str, ...] = ("train",),
    image_column: str | None = None,
    num_samples: int | None = None,
    seed: int = 42,
    **hub_kwargs: Any,
) -> datasets.Dataset:
    """Load a dataset of images, undecoded, so that one broken file does not end a run.

    Args:
        source: A folder of images (with or without a folder per class), a folder of parquet files, one parquet file, a
            folder written by `Dataset.save_to_disk`, a Hub id, or a dataset.
        split: Name of the split.
        default_splits: Taken, in this order, if no split is named; else the only one there is.
        image_column: Name of the image column; default: the one there is.
        num_samples: How many images to draw, without replacement; None for all, in their order.
        seed: Seed of the draw.
        **hub_kwargs: `revision`, `token`, `cache_dir`, `name`, … as for `datasets.load_dataset`.

    Returns:
        The dataset, all columns kept, with undecoded images.

    Raises:
        FileNotFoundError: if the source is a path that does not exist.
        ValueError: if the split or the image column is missing or ambiguous; the message lists what there is.
    """
    data = source if isinstance(source, datasets.Dataset | datasets.DatasetDict) else _load(source, hub_kwargs)
    if isinstance(data, datasets.DatasetDict):
        data = data[_split(data, split, default_splits)]
    column = find_image_column(data, image_column)
    if isinstance(data.features[column], datasets.Image):
        data = data.cast_column(column, datasets.Image(decode=False))
    if num_samples is None:
        return data
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is not a positive number of images.")
    if num_samples > len(data):
        logger.warning(f"num_samples={num_samples}, but the dataset holds {len(data)} images; all of them are used.")
    return data.shuffle(seed=seed).select(range(min(num_samples, len(data))))


def find_image_column(data: datasets.Dataset, image_column: str | None = None) -> str:
    """Name of the column with the images.

    Raises:
        ValueError: if it is missing or ambiguous.
    """
    columns = list(data.features)
    if image_column is not None:
        if image_column not in columns:
            raise ValueError(f"image_column={image_column!r} does not exist; the columns are {', '.join(columns)}.")
        return image_column
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in columns if name.lower() in _COLUMN_NAMES]
    if len(found) != 1:
        problem = "no column holds images" if not found else f"several columns hold images ({', '.join(found)})"
        raise ValueError(
            f"In the dataset, {problem}; name one with image_column. The columns are {', '.join(columns)}."
        )
    return found[0]


def _load(source: str | Path, hub_kwargs: dict[str, Any]) -> datasets.Dataset | datasets.DatasetDict:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{str(source)!r} is a file, but no parquet file; name a folder of images.")
        return datasets.load_dataset("parquet", data_files=str(path))
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), **hub_kwargs)
    looks_local = (
        str(source).startswith((".", "~", os.sep))
        or str(source).count("/") > 1
        or (os.sep == "\\" and "\\" in str(source))
    )
    if isinstance(source, Path) or looks_local:
        raise FileNotFoundError(f"There is no folder or file {str(source)!r}; name a folder of images or a Hub id.")
    return datasets.load_dataset(str(source), **hub_kwargs)


def _split(data: datasets.DatasetDict, split: str | None, default_splits: tuple[str, ...]) -> str:
    names = list(data)
    if split is not None:
        if split not in names:
            raise ValueError(f"split={split!r} does not exist; the splits are {', '.join(names)}.")
        return split
    for name in default_splits:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise ValueError(f"The dataset has several splits: {', '.join(names)}. Name one with `split`.")
