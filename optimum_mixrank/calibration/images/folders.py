"""Local folders of images: every image file in them, whatever it is called, with its split and its class."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import yaml  # type: ignore[import-untyped]
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import metadata_load

from ...runtime.logging import get_logger


logger = get_logger(__name__)

ENDINGS = frozenset({*ImageFolder.EXTENSIONS, ".avif", ".heic", ".heif", ".hif", ".jxl", ".pjpeg", ".pjp"})
"""Endings of image files in lower case: those of `datasets`, and those of formats that Pillow reads in newer releases."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files with a row per image, which `datasets` reads."""

_TABLES = (".parquet", ".arrow", ".tar", ".tar.gz")
"""Endings of files that hold a dataset each; `datasets` reads archives made by `tar` as WebDataset."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Endings of archives that are read like the folder in them."""

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of folders by the split that they hold, as in `datasets`."""


@dataclass
class _Files:
    """What a folder holds: paths relative to it, with `/`; `images` are in order and tell where to read each of them.

    The members of an archive count as files of a folder that is called like the archive without its ending.
    """

    folder: Path
    images: dict[str, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    tables: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def load_image_folder(
    folder: Path, split: str | None = None, streaming: bool = False, cache_dir: str | None = None
) -> Any:
    """Load all images of a local folder, undecoded and in the order of their paths.

    Splits are folders called `train`, `validation`, `test` and so on, if there is nothing else; names of other folders
    and of files mean nothing but classes. Classes are the folders around the images, if there are several, at one depth.
    Files called `metadata.csv`, `.jsonl` or `.parquet` list the images instead, with further columns.

    Args:
        folder: The folder. Links in it are followed; names that begin with `.` or folders with `__` are left out.
        split: The split that is asked for, which decides if other images lie beside the folders of the splits.
        streaming: Whether to return a stream.
        cache_dir: Where `datasets` keeps what it has read of files of metadata; the default is its own.

    Returns:
        The splits, as `datasets.load_dataset` returns them; None for a folder of something else, or with a `README.md`
        that says which files belong to which split.

    Raises:
        OSError: if a folder in it cannot be read.
        ValueError: if some images lie in folders of splits and others do not, and for metadata or names of files that
            cannot be read.
    """
    if _is_configured(folder):
        return None
    files = _find(folder)
    if not files.images:
        return None
    if files.tables >= len(files.images):
        logger.warning(
            f"{str(folder)!r} is read as a dataset in parquet, arrow or tar files; its images ({len(files.images):,}), "
            f"such as {next(iter(files.images))!r}, are left out."
        )
        return None
    _report_others(files)
    splits = _split(files, split)
    described = _by_folder(files.metadata, nested=False) or {}
    if files.metadata and (len(splits) == 1 or described.keys() == splits.keys()):
        return _load_metadata(files, streaming, cache_dir)
    if files.metadata:
        logger.warning(
            f"{', '.join(files.metadata)} in {str(folder)!r} is left out, since the folder has one folder per split; put "
            "one into each of them."
        )
    return _load_images(files, splits, streaming)


def load_image_archive(path: Path, split: str | None = None) -> Any:
    """Load all images of an archive, which `datasets` extracts into its cache; see `load_image_folder`.

    Raises:
        ValueError: if it is not an archive, or holds no images.
    """
    # The cache knows archives by their paths alone, so one that has changed has to be extracted again.
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(force_extract=True))
    try:
        extracted = Path(manager.extract(str(path)))
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{str(path)!r} cannot be extracted ({error}); name a folder of images.") from error
    images = load_image_folder(extracted, split) if extracted.is_dir() else None
    if images is None:
        raise ValueError(f"{str(path)!r} is not an archive of images; name one, or a folder of images.")
    return images


def missing_labels(paths: Iterable[str]) -> str | None:
    """Return why the folders around images, given by their paths, are not classes; None if they could be."""
    depths, parents = set(), {}
    for path in paths:
        parent = PurePosixPath(path.replace(os.sep, "/").split("::")[0]).parent
        depths.add(len(parent.parts))
        parents[parent.name] = path
    if len(parents) == 1:
        return f"all of them lie in one folder, {next(iter(parents))!r}"
    if len(depths) > 1:
        return "they lie at different depths of folders"
    return None


def _is_configured(folder: Path) -> bool:
    """Return whether a dataset card says which files belong to which split."""
    card = folder / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except (ValueError, yaml.YAMLError):
        return False


def _find(folder: Path) -> _Files:
    files = _Files(folder)
    found: list[tuple[str, str]] = []
    for relative in _walk(str(folder), "", frozenset()):
        path = PurePosixPath(relative)
        ending = path.suffix.lower()
        if path.name.startswith("."):
            # macOS keeps attributes of `a.jpg` in `._a.jpg`.
            files.unused["hidden images"] += ending in ENDINGS and not path.name.startswith("._")
        elif ending in ENDINGS:
            found.append((relative, str(folder / relative)))
        elif path.name in METADATA:
            files.metadata.append(relative)
        elif ending == ".zip":
            files.archives.append(relative)
        elif path.name.lower().endswith(_TABLES):
            files.tables += 1
        elif ending:
            files.others[ending] += 1
        else:
            files.unused["files without an ending"] += 1
    if found:
        files.unused |= {"zip archives": len(files.archives), "parquet, arrow or tar files": files.tables}
    elif not files.tables and not files.metadata:
        found = [member for archive in files.archives for member in _members(folder, archive)]
    files.images = dict(sorted(found))
    files.metadata.sort()
    return files


def _walk(folder: str, relative: str, around: frozenset[str]) -> Iterator[str]:
    """Yield the files below a folder; a link to a folder around it is a loop, which is left out."""
    real = os.path.realpath(folder)
    if real in around:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield relative + entry.name
            elif not entry.name.startswith((".", "__")):
                yield from _walk(entry.path, f"{relative}{entry.name}/", around | {real})


def _members(folder: Path, archive: str) -> Iterator[tuple[str, str]]:
    """Yield the images in a zip archive, each with the path to read it from."""
    try:
        with zipfile.ZipFile(folder / archive) as opened:
            names = opened.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(folder / archive)!r} cannot be read as a zip archive: {error}.") from error
    if "::" in str(folder / archive):
        raise ValueError(f"{str(folder / archive)!r} cannot be read, since `::` separates paths; rename it.")
    for name in names:
        hidden = any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)
        if not hidden and PurePosixPath(name).suffix.lower() in ENDINGS:
            if "::" in name or ("*" in name and glob.has_magic(name)):
                raise ValueError(
                    f"{name!r} in {str(folder / archive)!r} cannot be read, since `::` and `*` mean something else in a "
                    "path; extract the archive, and name the folder."
                )
            yield f"{archive[: -len('.zip')]}/{name}", f"zip://{name}::{folder / archive}"


def _report_others(files: _Files) -> None:
    unused = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(files.unused.items()) if count)
    if unused:
        logger.warning(
            f"{str(files.folder)!r} holds {len(files.images):,} images; other files in it are left out: {unused}."
        )
    others = ", ".join(f"{ending} ({count:,})" for ending, count in sorted(files.others.items()))
    if others:
        logger.info(f"Files in {str(files.folder)!r} without the ending of an image are left out: {others}.")


def _split(files: _Files, split: str | None) -> dict[str, list[str]]:
    """Return the images by split; `train` has all of them if their folders are not splits."""
    exact = {path: _named_split(path) for path in files.images}
    for nested in (False, True):
        splits = _by_folder(files.images, nested)
        if splits is not None:
            return splits
    named = {name for name in exact.values() if name is not None}
    if split is not None:
        asked = [path for path in files.images if split in (exact[path], _named_split(path, nested=True))]
        if asked:
            return {split: asked}
    where, listed = repr(str(files.folder)), " and ".join(sorted(named))
    outside = next((path for path, name in exact.items() if name is None), None)
    # Below classes there are no further folders, but there are below splits.
    holds_folders = any(
        _named_split(str(PurePosixPath(path).parent)) for path, name in exact.items() if name is not None
    )
    if len(named) == 1 and holds_folders:
        logger.warning(
            f"{where} holds a folder of the split {listed}, and other images beside it, such as {outside!r}; all are read "
            "as one dataset. To leave the others out, name the split with `split`."
        )
    if len(named) > 1:
        if holds_folders:
            raise ValueError(
                f"{where} holds folders of the splits {listed}, and other images, such as {outside!r}; name a split with "
                "`split`, or one of the folders as the dataset."
            )
        logger.warning(
            f"{where} holds folders that are called {listed}, and others beside them; all are read as classes. If they "
            "are splits, name one with `split`."
        )
    return {"train": list(files.images)}


def _by_folder(paths: Iterable[str], nested: bool) -> dict[str, list[str]] | None:
    """Return paths by split; None if one is in no split. See `_named_split`."""
    splits: dict[str, list[str]] = {name: [] for name in _SPLITS}
    for path in paths:
        name = _named_split(path, nested)
        if name is None:
            return None
        splits[name].append(path)
    return {name: found for name, found in splits.items() if found}


def _named_split(path: str, nested: bool = False) -> str | None:
    """Return the split that the outermost folder of such a name holds.

    If `nested`, a word of the name is enough, as in `train_set`, but the folder has to hold others, as a class does not.
    """
    folders = PurePosixPath(path).parent.parts
    for folder in folders[:-1] if nested else folders:
        words = re.split(r"[-._ 0-9]+", folder) if nested else [folder]
        for split, names in _SPLITS.items():
            if any(word in names for word in words):
                return split
    return None


def _load_images(files: _Files, splits: Mapping[str, list[str]], streaming: bool) -> Any:
    folders = {path: PurePosixPath(path).parent for paths in splits.values() for path in paths}
    names = sorted({folder.name for folder in folders.values()})
    # A folder that is a split is not a class.
    are_splits = len(splits) > 1 and all(
        _named_split(path) is not None and _named_split(str(folder)) is None for path, folder in folders.items()
    )
    labelled = set(splits) if _are_classes(list(folders.values())) and not are_splits else set()
    if not labelled and not are_splits and len(splits) > 1:
        # A split without classes does not take them from the others.
        labelled = {split for split, paths in splits.items() if _are_classes([folders[path] for path in paths])}
        names = sorted({folders[path].name for split in labelled for path in splits[split]})
    loaded: dict[str, Any] = {}
    for split, paths in splits.items():
        has_labels = split in labelled
        features = datasets.Features({"image": datasets.Image(decode=False)})
        if has_labels:
            features["label"] = datasets.ClassLabel(names=names)
        columns: dict[str, Any] = {"image": tuple(_checked_name(files.images[path]) for path in paths)}
        if has_labels:
            columns["label"] = tuple(folders[path].name for path in paths)
        if streaming:
            loaded[split] = datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=columns)
        else:
            columns = {name: list(values) for name, values in columns.items()}
            loaded[split] = datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
    return datasets.IterableDatasetDict(loaded) if streaming else datasets.DatasetDict(loaded)


def _are_classes(folders: Sequence[PurePosixPath]) -> bool:
    """Return whether the folders around images are classes: several of them, at one depth."""
    return len({folder.name for folder in folders}) > 1 and len({len(folder.parts) for folder in folders}) == 1


def _rows(**columns: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _checked_name(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The name of the file {path!r} is not Unicode; rename it.") from None
    return path


def _load_metadata(files: _Files, streaming: bool, cache_dir: str | None) -> Any:
    """Let `datasets` read the files of metadata, and say which images have no row."""
    named = ", ".join(files.metadata)
    if "::" in str(files.folder):
        raise ValueError(f"{str(files.folder)!r} with {named} cannot be read, since `::` separates paths; rename it.")
    splits = _by_folder(files.metadata, nested=False) or {"train": files.metadata}
    data_files = {split: [glob.escape(str(files.folder / path)) for path in paths] for split, paths in splits.items()}
    try:
        data = datasets.load_dataset("imagefolder", data_files=data_files, streaming=streaming, cache_dir=cache_dir)
    except ValueError as error:
        raise ValueError(
            f"{named} in {str(files.folder)!r} cannot be read as a list of images: {error}. Correct or rename it."
        ) from error
    if not streaming:
        listed = {path for part in data.values() for path in _paths(part)}
        unlisted = [path for path, source in files.images.items() if os.path.normpath(source) not in listed]
        if unlisted:
            logger.warning(
                f"{len(unlisted):,} of {len(files.images):,} images in {str(files.folder)!r} have no row in {named} and "
                f"are left out, such as {', '.join(unlisted[:3])}."
            )
    return data


def _paths(data: datasets.Dataset) -> Iterator[str]:
    for name, kind in data.features.items():
        if isinstance(kind, datasets.Image):
            for image in data.select_columns(name).cast_column(name, datasets.Image(decode=False))[name]:
                if image is not None and image["path"]:
                    yield os.path.normpath(image["path"])
