"""Where new content of a folder is written, and how it takes the place of the old."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .files import RANDOM_PART, check_name, temporary_path, temporary_prefix


if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100 if sys.platform != "darwin" else -2

_SWAP = 2
"""`RENAME_EXCHANGE` of Linux and `RENAME_SWAP` of macOS."""

INSIDE = ".saving-"
"""Prefix of the names of temporary folders inside the destination."""


def resolved(path: str | Path) -> Path:
    """Return an absolute path with `~` expanded and all links followed, whether anything is there or not."""
    return Path(os.path.realpath(Path(path).expanduser()))


def is_leftover(name: str) -> bool:
    """Return whether an entry of a folder has the name of a temporary folder in which its new content was written."""
    return re.fullmatch(re.escape(INSIDE) + RANDOM_PART, name) is not None


def entries(folder: Path) -> set[str]:
    """Return the names of what a folder holds, without temporary folders; empty if there is no folder."""
    return {name for name in os.listdir(folder) if not is_leftover(name)} if os.path.isdir(folder) else set()


def can_be_renamed(folder: Path) -> bool:
    """Return whether another folder could take the place of this one, which may not exist.

    It could not where something is mounted, where the parent cannot be written, and where this process stands in the
    folder, which would then find itself in the old one.
    """
    if _is_mount_point(folder):
        return False
    try:
        if resolved(".").is_relative_to(folder):
            return False
        _probe(folder.parent, temporary_prefix(folder.name, INSIDE))
    except OSError:
        return False
    return True


def check_writable_folder(folder: Path) -> None:
    """Check that new content for a folder can be written, by making and removing a temporary one; make its parents.

    Raises:
        OSError: if it cannot, in the words of the system.
    """
    check_name(folder)
    if folder.is_dir():
        _probe(folder, INSIDE)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _probe(folder.parent, temporary_prefix(folder.name, INSIDE))


@contextmanager
def staging_folder(destination: Path, inside: bool) -> Iterator[Path]:
    """Provide an empty folder for new content of `destination`, on its file system.

    What is left there in the end is for the caller to remove.

    Args:
        destination: The folder, which may not exist.
        inside: Whether to make it inside the destination rather than beside.
    """
    if inside:
        destination.mkdir(exist_ok=True)
    folder = (
        temporary_path(destination, INSIDE)
        if inside
        else temporary_path(destination.parent, temporary_prefix(destination.name, INSIDE))
    )
    folder.mkdir()
    # As long as it is locked it is not taken for a leftover.
    with locked(folder):
        yield folder


def remove_leftovers(destination: Path, keep: str | None = None) -> None:
    """Remove temporary folders of runs that were cut off while they saved to `destination`.

    Args:
        destination: The folder, which may not exist.
        keep: Name of a temporary folder inside it that is still in use.
    """
    beside = re.escape(temporary_prefix(destination.name, INSIDE)) + RANDOM_PART
    found = [each for each in _listed(destination.parent) if re.fullmatch(beside, each.name)]
    found += [each for each in _listed(destination) if is_leftover(each.name) and each.name != keep]
    for each in found:
        if each.is_dir() and not each.is_symlink():
            with suppress(OSError), locked(each, wait=False):
                shutil.rmtree(each, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, which other processes respect that ask for it; it leaves no file.

    Where the system has no such locks, nothing is held.

    Raises:
        BlockingIOError: if another process holds it, and `wait` is False.
    """
    with ExitStack() as stack:
        if sys.platform != "win32":
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:
                pass
        yield


def take_place(source: Path, destination: Path) -> bool:
    """Rename a folder to the name of one that does not exist or is empty; return False if it holds something.

    Raises:
        OSError: if it cannot be renamed.
    """
    _keep_permissions(source, destination)
    try:
        if os.name == "nt" and destination.is_dir():
            destination.rmdir()
        source.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; return False where this system or file system cannot."""
    if os.name == "nt":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if function is None:
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    _keep_permissions(first, second)
    return function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _SWAP) == 0


def free_path(path: Path) -> Path:
    """Return the path if nothing is there, otherwise the first with a number added that is free."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 10**6))
    return path if not os.path.lexists(path) else next(each for each in numbered if not os.path.lexists(each))


def _keep_permissions(new: Path, old: Path) -> None:
    """Give a folder the permissions and, where allowed, the owner of the one whose place it takes."""
    with suppress(OSError):
        status = old.stat()
        if os.name != "nt" and (status.st_uid, status.st_gid) != (new.stat().st_uid, new.stat().st_gid):
            os.chown(new, status.st_uid, status.st_gid)
        shutil.copymode(old, new)


def _probe(folder: Path, prefix: str) -> None:
    """Make and remove a folder in another, as the only way to know that it can be written."""
    probe = temporary_path(folder, prefix)
    probe.mkdir()
    probe.rmdir()


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # A folder of the same file system that is mounted elsewhere, as Docker does, shows only here.
    escaped = str(folder)
    for letter in ("\\", " ", "\t", "\n"):
        escaped = escaped.replace(letter, f"\\{ord(letter):03o}")
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return any(line.split(" ")[4] == escaped for line in lines)
    return False
