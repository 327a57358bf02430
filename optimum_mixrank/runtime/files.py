"""Files and folders that are complete or not there."""

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


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file beside another, which takes its place when it has been written and is on the disk; else it goes.

    Raises:
        OSError: if the disk is full, say; what was there stays.
    """
    temporary: Path | None = None
    try:
        with explained_no_space(path):
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            os.close(descriptor)
            temporary = Path(name)
            yield temporary
            # mkstemp makes files of mode 0600; these are as readable as other new files.
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
    """Say what could not be written, and that nothing is lost, where a disk or a quota is full.

    Raises:
        OSError: in the place of one that says so, or of safetensors' own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _error_number(error)
        if number not in _NO_SPACE:
            raise
        raise OSError(
            f"{os.strerror(number)}: {str(path)!r} could not be written. What stood there before is as it was; free some "
            "space and try again."
        ) from error


def _error_number(error: SafetensorError) -> int:
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AT_FDCWD = -100 if sys.platform != "darwin" else -2

_SWAP = 2
"""`RENAME_EXCHANGE` of Linux and `RENAME_SWAP` of macOS."""


def temporary_prefix(destination: Path) -> str:
    """What the name of a folder begins with in which the new content of `destination` is written."""
    return f".{destination.name}.saving-"


def put_in_place(source: Path, destination: Path, last: str) -> None:
    """Let a complete folder take the place of another.

    Linux and macOS exchange two names in one step: old or new stands there whenever a run is cut off. Where the system or
    the file system cannot, files are moved one by one. Whoever looks at the folder meanwhile finds new files beside the
    old one that is named to be the last.

    Args:
        source: The new folder, on the same file system; it may hold the old content afterwards.
        destination: Where it is to stand.
        last: Name of the file that is moved last.
    """
    if not destination.exists() or not any(destination.iterdir()):
        if destination.exists():
            destination.rmdir()
        source.rename(destination)
    elif not _exchange(source, destination):
        new = sorted(source.iterdir(), key=lambda file: file.name == last)
        for file in new:
            _remove(destination / file.name, only_folder=True)
            file.replace(destination / file.name)
        for name in {file.name for file in destination.iterdir()} - {file.name for file in new}:
            _remove(destination / name)
        flush(destination)
    flush(destination.parent)


def remove_leftovers(destination: Path) -> None:
    """Remove what runs that were cut off while saving to `destination` have left beside it."""
    if destination.parent.is_dir():
        for each in list(destination.parent.iterdir()):
            # What `tempfile` puts behind the prefix: names of other folders do not match.
            name = re.escape(temporary_prefix(destination)) + "[a-z0-9_]{8}"
            if re.fullmatch(name, each.name) and each.is_dir():
                shutil.rmtree(each, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Wait until a folder, all that is in it, is on the disk."""
    for each in (*folder.rglob("*"), folder):
        flush(each)


def _remove(path: Path, only_folder: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not only_folder:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change names in one step; False where this machine or file system cannot."""
    if os.name == "nt":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if function is None:
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _SWAP) == 0
