"""Find images: in local folders and files, on the Hub, or in a dataset that is already loaded."""

from __future__ import annotations

import difflib
import glob
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from ...checkpoint.replacing import RANKS_NAME
from ...checkpoint.validation import check_integer, check_seed
from ...runtime.access import hub_access, why_unreachable
from ...runtime.files import similar_paths
from ...runtime.formatting import counted, type_of
from ...runtime.logging import get_logger
from .files import is_remote, open_file
from .folders import ARCHIVES, load_image_archive, load_image_folder


logger = get_logger(__name__)

Data = TypeVar("Data", datasets.Dataset, datasets.IterableDataset)

_WINDOW = 1024
"""Minimum number of images of a stream among which the next one is drawn."""

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
    """Load a dataset of undecoded images, so that one broken file does not end a run.

    Args:
        source: A folder of images (with or without a folder per split and class), an archive of such a folder (zip or
            tar), a folder of parquet files, one parquet file, a folder written by `save_to_disk`, a Hub id, or a dataset.
        split: Name of the split.
        default_splits: Splits to try in this order if none is named; a dataset's only split serves otherwise.
        image_column: Name of the image column; default: the only one.
        num_samples: Number of images to draw, without replacement and in the dataset's order; None for all.
        seed: Seed of the draw.
        **hub_kwargs: `revision`, `token`, `cache_dir`, `name`, … as for `datasets.load_dataset`; default of the token: the
            one that the compressor or the command was given. With `streaming=True` only a little more than the drawn
            images is downloaded: files are read in random order, images are drawn from a window that moves over them.
            They are kept in memory, undecoded.

    Returns:
        The dataset with undecoded images and all its columns.

    Raises:
        FileNotFoundError: if the source is a path that does not exist, or a folder without data.
        TypeError: if the source is something else, or an argument does not exist.
        ValueError: if the split or the image column is missing or ambiguous, in a message that lists those there are;
            or for a stream without `num_samples`.
    """
    if num_samples is not None:
        check_integer("num_samples", num_samples, 1)
    check_seed(seed)
    try:
        loaded = _load(source, split, hub_kwargs)
    except ValueError as error:
        unknown = re.search(r"doesn't have a '(\w+)' key", str(error))
        if unknown is None or unknown[1] not in hub_kwargs:
            raise
        raise TypeError(_unknown_argument(unknown[1])) from error
    data = _select_split(loaded, split, default_splits)
    if data.features is None:
        raise ValueError("The stream does not tell its columns before it is read; load the dataset without streaming.")
    column = find_image_column(data.features, image_column)
    for name in [column, *(name for name, feature in data.features.items() if isinstance(feature, datasets.Image))]:
        data = _undecoded(data, name)
    if isinstance(data, datasets.IterableDataset):
        drawn = _draw_from_stream(data, num_samples, seed)
        for row in drawn:
            row[column] = _downloaded(row[column], _token(hub_kwargs))
        return datasets.Dataset.from_list(drawn, features=data.features)
    return data if num_samples is None else data.select(drawn_indices(len(data), num_samples, seed))


def drawn_indices(count: int, num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw from `count` images without replacement, and return their indices in ascending order; all if there are fewer.

    A number that is not a positive integer is a ValueError.
    """
    check_integer("num_samples", num_samples, 1)
    if num_samples > count:
        _warn_about_few(count, num_samples)
    return np.sort(np.random.default_rng(seed).permutation(count)[:num_samples])


def _warn_about_few(count: int, num_samples: int) -> None:
    logger.warning(
        f"The dataset holds {counted(count, 'image')}, fewer than the {num_samples} to draw; all of them are used."
    )


def local_paths(source: Any) -> list[Path]:
    """Return the local folders and files from which images are read, as far as a source tells.

    Args:
        source: What `load_image_dataset` takes, a list of images or paths, or anything else, which tells nothing. A
            dataset that is already loaded tells the file of its first image.
    """
    if isinstance(source, str | Path):
        return [Path(source)]
    if isinstance(source, list | tuple):
        # Not every file, but every folder of one. By index, since iterating may read what a list of the user's only reads
        # when it is needed.
        each_item = (source[index] for index in range(len(source)))
        files = {os.path.dirname(each): each for each in each_item if isinstance(each, str | Path)}
        return [Path(file) for file in files.values()]
    if isinstance(source, datasets.DatasetDict):
        return [path for split in source.values() for path in local_paths(split)]
    if isinstance(source, datasets.Dataset) and len(source):
        columns = [name for name, column in source.features.items() if isinstance(column, datasets.Image)]
        first = _undecoded(source.select([0]), columns[0])[0][columns[0]] if columns else None
        path = (first or {}).get("path")
        return [Path(path)] if path and os.path.isabs(path) else []
    return []


def find_image_column(columns: Mapping[str, Any], image_column: str | None = None) -> str:
    """Return the name of the column with images, given a dataset's features or a row; a given name is only checked.

    A column that is missing or ambiguous is a ValueError.
    """
    names = ", ".join(map(str, columns))
    if image_column is not None:
        if image_column not in columns:
            raise ValueError(f"image_column={image_column!r} does not exist; the columns are {names}.")
        return image_column
    found = [name for name, column in columns.items() if isinstance(column, datasets.Image | Image.Image)]
    found = found or [name for name in columns if str(name).lower() in _COLUMN_NAMES]
    if len(found) != 1:
        problem = f"several columns hold images ({', '.join(found)})" if found else "no column holds images"
        raise ValueError(f"In the dataset, {problem}; name one with image_column. The columns are {names}.")
    return found[0]


def _load(source: Any, split: str | None, hub_kwargs: Mapping[str, Any]) -> Any:
    if isinstance(source, datasets.Dataset | datasets.DatasetDict):
        _refuse(hub_kwargs, "a dataset in memory")
        return source
    if not isinstance(source, str | Path):
        raise TypeError(
            f"source is {type_of(source)}, not an image dataset; give a folder, a Hub id or a `datasets.Dataset`."
        )
    if not str(source):
        raise FileNotFoundError("The name of the dataset is empty; name a folder of images or a Hub id.")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), **hub_kwargs)
        if not path.name.lower().endswith(ARCHIVES):
            raise ValueError(
                f"{str(source)!r} is a file, but neither a parquet file nor an archive ({', '.join(ARCHIVES)}); name a "
                "folder of images."
            )
        _refuse({name: value for name, value in hub_kwargs.items() if name != "token"}, "an archive")
        return load_image_archive(path.absolute(), split)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            _refuse(hub_kwargs, "a folder written by `save_to_disk`")
            return datasets.load_from_disk(str(path))
        if _holds_a_model_alone(path):
            raise ValueError(f"{str(source)!r} holds a model and no images; name a folder of images.")
        given = {name: value for name, value in hub_kwargs.items() if value is not None}
        if given.keys() <= {"streaming", "cache_dir", "token"}:
            options = {name: value for name, value in given.items() if name != "token"}
            images = load_image_folder(path.absolute(), split, **options)
            if images is not None:
                return images
        try:
            return datasets.load_dataset(str(path), **hub_kwargs)
        except FileNotFoundError as error:
            if glob.has_magic(str(path)) or "::" in str(path):
                raise ValueError(
                    f"`datasets` cannot read {str(source)!r}, since its name contains one of * ? [ ::, which have a "
                    "special meaning in paths; rename it."
                ) from error
            if not any(each.is_file() for each in path.rglob("*")):
                raise FileNotFoundError(f"The folder {str(source)!r} is empty; name a folder of images.") from error
            raise
        except ValueError as error:
            if "WebDataset" in str(error):
                raise ValueError(
                    f"{str(source)!r} holds tar archives that are not a WebDataset; name one of them as the "
                    f"dataset, or extract them and name the folder with their images. ({error})"
                ) from error
            raise
    if isinstance(source, Path) or _looks_local(source):
        hint = similar_paths(str(source)) or "name a folder of images or a Hub id."
        raise FileNotFoundError(f"There is no folder or file {str(source)!r}; {hint}")
    token = _token(hub_kwargs)
    arguments = hub_kwargs if token is None else {**hub_kwargs, "token": token}
    with _offline_if_unreachable() as reason:
        try:
            return datasets.load_dataset(source, **arguments)
        except (ConnectionError, FileNotFoundError) as error:
            raise FileNotFoundError(_not_found(source, reason or str(error).rstrip("."))) from error


def _holds_a_model_alone(folder: Path) -> bool:
    """Return whether a folder is that of a checkpoint, in which the only picture is that of the ranks."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return False
    others = (each for each in folder.rglob("*") if each.suffix.lower() in Image.registered_extensions())
    return all(each.name == RANKS_NAME for each in others)


@contextmanager
def _offline_if_unreachable() -> Iterator[str]:
    """Let `datasets` read its cache alone if there is no connection, for which it would try for half a minute.

    Yields:
        Why there is no connection; empty if there is one.
    """
    reason, before = why_unreachable(), datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or bool(reason)
    try:
        yield reason
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _not_found(source: str, reason: str) -> str:
    # Most often a folder whose name was misspelt.
    hint = similar_paths(source) or "name a folder of images or a Hub id."
    return f"There is no folder {source!r}, nor could it be read from the Hub ({reason}); {hint}"


def _token(hub_kwargs: Mapping[str, Any]) -> str | bool | None:
    """Return the token that was given, else that of the context; the cache of models is not that of datasets."""
    given = hub_kwargs.get("token")
    return hub_access().get("token") if given is None else given


def _looks_local(source: str) -> bool:
    # A Hub id is `name` or `user/name`.
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or (os.sep != "/" and os.sep in source)


def _unknown_argument(name: str) -> str:
    own = [
        each.name
        for each in inspect.signature(load_image_dataset).parameters.values()
        if each.kind != each.VAR_KEYWORD
    ]
    close = difflib.get_close_matches(name, own, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "the loader of `datasets` has none of this name either."
    return f"There is no argument `{name}`; {hint}"


def _refuse(hub_kwargs: Mapping[str, Any], source: str) -> None:
    given = [name for name, value in hub_kwargs.items() if value is not None]
    for name in given:
        if name not in inspect.signature(datasets.load_dataset).parameters:
            raise TypeError(_unknown_argument(name))
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be applied to {source}; leave {'it' if len(given) == 1 else 'them'} out."
        )


def _select_split(data: Any, split: str | None, default_splits: tuple[str, ...]) -> Any:
    if isinstance(data, datasets.Dataset):
        if split is not None:
            raise ValueError(f"split={split!r} cannot be chosen: this is one dataset without splits; leave it out.")
        return data
    if not isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"Images cannot be drawn from {type_of(data)}; load all splits of the dataset.")
    names = list(data)
    if split is not None and split not in names:
        raise ValueError(f"split={split!r} does not exist; the splits are {', '.join(names)}.")
    candidates = [name for name in ((split,) if split else default_splits) if name in names]
    if not candidates and len(names) != 1:
        raise ValueError(f"The dataset has several splits: {', '.join(names)}. Name one with `split`.")
    return data[candidates[0] if candidates else names[0]]


def _draw_from_stream(stream: datasets.IterableDataset, num_samples: int | None, seed: int) -> list[dict[str, Any]]:
    if num_samples is None:
        raise ValueError("streaming=True needs num_samples, since the images are kept in memory; or do not stream.")
    drawn = list(stream.shuffle(seed=seed, buffer_size=max(_WINDOW, num_samples)).take(num_samples))
    if len(drawn) < num_samples:
        _warn_about_few(len(drawn), num_samples)
    return drawn


def _downloaded(image: dict[str, Any] | None, token: str | bool | None) -> dict[str, Any] | None:
    """Return an undecoded image with the bytes of a remote file, so that not every pass downloads it again."""
    if image is not None and image["bytes"] is None and is_remote(image["path"]):
        # One that cannot be read is a broken image, which is reported when it is decoded.
        with suppress(OSError, ValueError), open_file(image["path"], token=token) as file:
            return {**image, "bytes": file.read()}
    return image


def _undecoded(data: Data, column: str) -> Data:
    feature = data.features[column]
    if isinstance(feature, datasets.Image) and not feature.decode:
        return data
    try:
        # Columns of paths or of encoded bytes can become image columns too.
        return data.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"Column {column!r} holds {feature} instead of images; name another with image_column."
        ) from error
