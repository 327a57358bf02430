"""Put a complete folder in the place of another, so that one of the two stands there whenever a run is cut off."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .journal import flush


_AT_FDCWD = -100 if sys.platform != "darwin" else -2
_SWAP = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def temporary_prefix(destination: Path) -> str:
    """What the name of a folder begins with in which the new content of `destination` is written."""
    return f".{destination.name}.saving-"


def put_in_place(source: Path, destination: Path) -> None:
    """Rename a folder to another's name; where there is one of that name, they change places or the old one goes.

    Linux and macOS exchange two names in one step. Where the system or the file system cannot, the old folder is set
    aside first, and between the two renames there is none; `recover` brings it back.

    Args:
        source: The new folder, on the same file system.
        destination: Where it is to stand.
    """
    if not destination.exists() or not any(destination.iterdir()):
        source.replace(destination) if os.name != "nt" else _replace_empty(source, destination)
    elif not _exchange(source, destination):
        aside = Path(tempfile.mkdtemp(prefix=_aside_prefix(destination), dir=destination.parent)) / destination.name
        destination.rename(aside)
        try:
            source.rename(destination)
        except OSError:
            aside.rename(destination)
            raise
        finally:
            shutil.rmtree(aside.parent, ignore_errors=destination.exists())
    flush(destination.parent)


def recover(destination: Path) -> None:
    """Bring an old folder back that was set aside when a run was cut off between two renames."""
    if destination.exists():
        return
    for folder in _folders(destination, _aside_prefix(destination)):
        # Another process may have done so already.
        with suppress(OSError):
            (folder / destination.name).rename(destination)
            folder.rmdir()


def remove_leftovers(destination: Path) -> None:
    """Remove what runs that were cut off while saving to `destination` have left beside it."""
    for prefix in (temporary_prefix(destination), _aside_prefix(destination)):
        for folder in _folders(destination, prefix):
            shutil.rmtree(folder, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Wait until a folder, all that is in it, is on the disk."""
    for each in (*folder.rglob("*"), folder):
        flush(each)


def _aside_prefix(destination: Path) -> str:
    return f".{destination.name}.old-"


def _folders(destination: Path, prefix: str) -> Iterator[Path]:
    if not destination.parent.is_dir():
        return
    for each in list(destination.parent.iterdir()):
        # What `tempfile` puts behind the prefix: names of other folders do not match.
        if re.fullmatch(re.escape(prefix) + "[a-z0-9_]{8}", each.name) and each.is_dir():
            yield each


def _replace_empty(source: Path, destination: Path) -> None:
    """Windows renames to no name that exists, not even an empty folder's."""
    if destination.exists():
        destination.rmdir()
    source.rename(destination)


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
