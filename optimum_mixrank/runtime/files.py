"""Files and folders that are either complete or not there."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_AT_FDCWD = -100 if sys.platform != "darwin" else -2

_SWAP = 2
"""`RENAME_EXCHANGE` of Linux and `RENAME_SWAP` of macOS."""


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; on exit it is flushed to disk and replaces `path`, after an error it is removed.

    Raises:
        OSError: if it cannot be written, for instance because the disk is full; `path` is unchanged.
    """
    temporary: Path | None = None
    try:
        with explained_no_space(path):
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            os.close(descriptor)
            temporary = Path(name)
            yield temporary
            # mkstemp creates files of mode 0600; other new files are readable by all.
            temporary.chmod(0o644)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def explained_no_space(path: Path) -> Iterator[None]:
    """Where a disk or a quota is full, name the file that could not be written and say that nothing is lost.

    Raises:
        OSError: in place of Python's own error or that of safetensors.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            number = error.errno
        else:
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else None
        if number not in _NO_SPACE:
            raise
        raise OSError(
            f"{os.strerror(number)}: {str(path)!r} could not be written. What was there before is unchanged; free some "
            "space and try again."
        ) from error


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for each in (*folder.rglob("*"), folder):
        flush(each)


def temporary_prefix(destination: Path) -> str:
    """Return the prefix of the name of a folder in which new content for `destination` is written."""
    return f".{destination.name}.saving-"


def put_in_place(source: Path, destination: Path, last: str) -> None:
    """Replace a folder by another, complete one.

    Linux and macOS exchange two names in one step, so that the old or the new content is there whenever a run is cut
    off. Where the system or the file system cannot, files are moved one by one; meanwhile the folder lacks one file, and
    cannot be mistaken for a complete one.

    Args:
        source: The new folder, on the same file system; it may hold the old content afterwards.
        destination: The folder to replace.
        last: Name of the file without which the folder is not complete; it is removed first and moved last.

    Raises:
        OSError: if a file cannot be moved; the message names the folder that holds the rest of the new files.
    """
    if not destination.exists() or not any(destination.iterdir()):
        if destination.exists():
            destination.rmdir()
        source.rename(destination)
    elif not _exchange(source, destination):
        try:
            _move_files(source, destination, last)
        except OSError as error:
            rest = source.rename(source.with_name(f"{destination.name}.rest"))
            raise OSError(
                f"{str(destination)!r} could not be replaced completely ({error}). The missing new files are in "
                f"{str(rest)!r}."
            ) from error
    flush(destination.parent)


def _move_files(source: Path, destination: Path, last: str) -> None:
    new = sorted(source.iterdir(), key=lambda file: file.name == last)
    _remove(destination / last)
    for file in new:
        _remove(destination / file.name, only_folder=True)
        file.replace(destination / file.name)
    for name in {file.name for file in destination.iterdir()} - {file.name for file in new}:
        _remove(destination / name)
    flush(destination)


def remove_leftovers(destination: Path) -> None:
    """Remove temporary folders that runs left beside `destination` when they were cut off while saving to it."""
    # The random part is as `tempfile` makes it, so that no other folder matches.
    name = re.escape(temporary_prefix(destination)) + "[a-z0-9_]{8}"
    if destination.parent.is_dir():
        for each in list(destination.parent.iterdir()):
            if re.fullmatch(name, each.name) and each.is_dir():
                shutil.rmtree(each, ignore_errors=True)


def _remove(path: Path, only_folder: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not only_folder:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; return False where this system or file system cannot."""
    if os.name == "nt":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if function is None:
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _SWAP) == 0
