"""Write a checkpoint, complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..runtime.files import explained_no_space, flush_tree, put_in_place, remove_leftovers, temporary_prefix
from .files import check_saved_files
from .modeling import FactoredLinear


def writable_directory(directory: str | Path, overwrite: bool) -> Path:
    """Check, before any work, that a checkpoint can be written to a folder, and make its parents.

    Raises:
        FileExistsError: if it holds files and may not be overwritten.
        NotADirectoryError: if it is a file.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_directory={str(directory)!r} is a file; name a folder.")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(
            f"save_directory={str(directory)!r} is not empty; choose another, or pass overwrite=True to replace it."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    return directory


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    image_processor: Any,
    *,
    dense: bool = False,
    overwrite: bool = False,
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
        overwrite: Whether to replace what the destination holds.
        describe: Writes further files into the folder that holds model and image processor.
        announce: Called with the complete folder before it is moved.
        **kwargs: Passed to Transformers' `save_pretrained`.

    Raises:
        ValueError: if the model is unexpectedly dense, or the files do not hold what the model holds.
        FileExistsError: as `writable_directory`.
    """
    if not dense and not any(isinstance(module, FactoredLinear) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} holds no factored layer; save a dense model with its own `save_pretrained`."
        )
    with _complete_or_not_at_all(directory, overwrite, announce) as temporary:
        model.save_pretrained(temporary, **kwargs)
        check_saved_files(model, temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)
        if describe is not None:
            describe(temporary)


@contextmanager
def _complete_or_not_at_all(
    directory: str | Path, overwrite: bool, announce: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Provide a folder that replaces the destination once everything has been written and has reached the disk."""
    destination = writable_directory(directory, overwrite)
    remove_leftovers(destination)
    with explained_no_space(destination):
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(destination), dir=destination.parent))
        try:
            # mkdtemp makes folders of mode 0700; a checkpoint should be as readable as other new folders.
            temporary.chmod(0o755)
            yield temporary
            for file in temporary.rglob("*"):
                # Some releases of safetensors write files of mode 0600.
                file.chmod(0o755 if file.is_dir() else 0o644)
            flush_tree(temporary)
            if announce is not None:
                announce(temporary)
            put_in_place(temporary, destination, last="config.json")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
