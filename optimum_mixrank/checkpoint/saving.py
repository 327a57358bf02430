"""Write a checkpoint, complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..runtime.files import explained_no_space, flush_tree
from ..runtime.folders import (
    can_be_renamed,
    check_writable_folder,
    entries,
    remove_leftovers,
    resolved,
    staging_folder,
)
from .entries import compressed_layers
from .files import check_saved_files
from .replacing import (
    CARD_NAME,
    CODE_NAME,
    HTML_NAME,
    RANKS_NAME,
    REPORT_NAME,
    checkpoint_files,
    replace_checkpoint,
    weights_in_use,
)


_WRITTEN = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    REPORT_NAME,
    HTML_NAME,
    RANKS_NAME,
    CARD_NAME,
    CODE_NAME,
}


ORIGINAL, IMAGES = "the model", "the images"
"""What `check_apart` tells apart."""


def writable_directory(
    directory: str | Path,
    overwrite: bool,
    progress: str | Path | None = None,
    sources: Mapping[str, Iterable[str | Path]] | None = None,
) -> Path:
    """Check, before any work, that a checkpoint can be written to a folder, and make its parents.

    Args:
        directory: The folder. `~` is expanded, and a link is followed.
        overwrite: Whether it may hold files.
        progress: The folder with the progress of the run, which may be inside.
        sources: What the run reads; see `check_apart`.

    Returns:
        The folder, as an absolute path without links.

    Raises:
        FileExistsError: if it holds files and may not be overwritten.
        NotADirectoryError: if it is a file.
        ValueError: if it is the root of the file system, or `progress` or inside of it, and as `check_apart`.
        OSError: if it cannot be written.
    """
    folder, shown = resolved(directory), f"save_directory={str(directory)!r}"
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{shown} is a file; name a folder.")
    if folder == folder.parent:
        raise ValueError(f"{shown} is the root of the file system; name a folder in it.")
    if progress is not None and folder.is_relative_to(resolved(progress)):
        raise ValueError(f"{shown} is the folder for the progress of the run, or inside of it; choose another.")
    held = entries(folder) - _inside(folder, progress)
    if held and not overwrite:
        raise FileExistsError(
            f"save_directory={str(directory)!r} is not empty; choose another, or pass overwrite=True to replace it."
        )
    check_apart(directory, sources or {})
    for name in sorted(held & _WRITTEN):
        if (folder / name).is_dir():
            raise FileExistsError(f"{shown} holds a folder {name!r} where a file has to be; choose another.")
    try:
        check_writable_folder(folder)
    except OSError as error:
        raise OSError(
            f"save_directory={str(directory)!r} cannot be written ({error.strerror}); choose another."
        ) from error
    return folder


def check_apart(
    directory: str | Path, sources: Mapping[str, Iterable[str | Path]], name: str = "save_directory"
) -> None:
    """Check, before any work, that a run does not write where it reads.

    Args:
        directory: The destination.
        sources: Folders and files by what they are; Hub ids and what does not exist are ignored.
        name: Name of the argument, for messages.

    Raises:
        ValueError: if the destination is one of them, holds one of them, or is inside a folder of images.
    """
    folder = resolved(directory)
    for what, paths in sources.items():
        for path in paths:
            source = resolved(path)
            if not str(path) or not os.path.exists(source):
                continue
            if source.is_relative_to(folder):
                relation = "is the same folder as" if source == folder else "holds"
            elif what == IMAGES and source.is_dir() and folder.is_relative_to(source):
                relation = "is inside"
            else:
                continue
            raise ValueError(f"{name}={str(directory)!r} {relation} {what} {str(path)!r}; choose another.")


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    image_processor: Any,
    *,
    dense: bool = False,
    overwrite: bool = False,
    progress: str | Path | None = None,
    checked: bool = False,
    describe: Callable[[Path], None] | None = None,
    announce: Callable[[Path], None] | None = None,
    **kwargs: Any,
) -> None:
    """Write a model beside its destination, and move it there when it is complete.

    Args:
        model: The model.
        directory: The destination.
        image_processor: The image processor to save with it, or None.
        dense: Whether the model is a dense one, which is refused otherwise.
        overwrite: Whether to replace the checkpoint that the destination holds; all else stays there.
        progress: See `writable_directory`.
        checked: Whether the destination was free before the work. If it no longer is, the checkpoint is written all the
            same, to a folder that the error names.
        describe: Writes further files into the folder that holds model and image processor.
        announce: Called with the complete folder before it is moved.
        **kwargs: Passed to Transformers' `save_pretrained`.

    Raises:
        ValueError: if the model is unexpectedly dense, or the files do not hold what the model holds.
        FileExistsError: as `writable_directory`, and as `replace_checkpoint`.
    """
    if not dense and not compressed_layers(model):
        raise ValueError(
            f"This {type(model).__name__} holds no factored layer; save a dense model with its own `save_pretrained`."
        )
    if not checked:
        writable_directory(directory, overwrite, progress)
    with _complete_or_not_at_all(resolved(directory), overwrite, progress, announce) as temporary:
        model.save_pretrained(temporary, **kwargs)
        check_saved_files(model, temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)
        if describe is not None:
            describe(temporary)


@contextmanager
def _complete_or_not_at_all(
    destination: Path, overwrite: bool, progress: str | Path | None, announce: Callable[[Path], None] | None
) -> Iterator[Path]:
    """Provide a folder whose content is put in its place once everything has been written and has reached the disk."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(destination, keep=weights_in_use(destination))
    stays = entries(destination) - checkpoint_files(destination) - _WRITTEN
    inside = bool(stays) or not can_be_renamed(destination)
    with explained_no_space(destination), staging_folder(destination, inside) as temporary:
        try:
            yield temporary
            for file in temporary.rglob("*"):
                # Some releases of safetensors write files of mode 0600; the folder's mode shows what the umask leaves.
                file.chmod(temporary.stat().st_mode & (0o777 if file.is_dir() else 0o666))
            flush_tree(temporary)
            if announce is not None:
                announce(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        replace_checkpoint(temporary, destination, overwrite, _inside(destination, progress))
    remove_leftovers(destination, keep=weights_in_use(destination))


def _inside(folder: Path, progress: str | Path | None) -> set[str]:
    """Return the name of the folder with the progress of the run if it is in `folder`."""
    if progress is None or resolved(progress).parent != folder:
        return set()
    return {resolved(progress).name}
