"""Files that are either complete or not there."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError


_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_LONGEST_NAME = 255
"""Bytes in a file name, on nearly every file system."""

RANDOM_PART = "[0-9a-f]{8}"
"""Regular expression for the end of a temporary name."""


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; on exit it is flushed to disk and replaces `path`, after an error it is removed.

    A link is followed, and the permissions are those that the umask leaves to new files.

    Raises:
        OSError: if it cannot be written, for instance because the disk is full; `path` is unchanged.
    """
    path = Path(os.path.realpath(path))
    temporary: Path | None = None
    try:
        with explained_no_space(path):
            temporary = _new_file(path)
            mode = temporary.stat().st_mode
            yield temporary
            # Some releases of safetensors put a file of mode 0600 in its place.
            temporary.chmod(mode)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def check_writable_file(path: str | Path) -> None:
    """Check, before any work, that `replaced_file` will be able to write a file.

    Raises:
        IsADirectoryError: if it is a folder.
        OSError: if its folder does not exist or cannot be written, or its name is too long.
    """
    found = Path(os.path.realpath(Path(path).expanduser()))
    if os.path.isdir(found):
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file in it.")
    if os.path.lexists(found) and not os.path.isfile(found):
        raise OSError(f"{str(path)!r} is a pipe or a device, which a file would replace; choose another place.")
    try:
        check_name(found)
        _new_file(found).unlink()
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be written ({error.strerror}); choose another place.") from error


def check_name(path: Path) -> None:
    """Raise an `OSError` if a file system cannot have such a name, for example because it is too long."""
    try:
        path.lstat()
    except FileNotFoundError:
        return


def temporary_prefix(name: str, label: str) -> str:
    """Return the beginning of the names of temporary files or folders that belong to `name`; a random part follows."""
    prefix = f".{name}{label}"
    if len(os.fsencode(prefix)) + 8 > _LONGEST_NAME:
        prefix = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}{label}"
    return prefix


def temporary_path(folder: Path, prefix: str) -> Path:
    """Return a path in a folder that nothing has; a random part is added to the prefix."""
    return folder / f"{prefix}{secrets.token_hex(4)}"


def _new_file(path: Path) -> Path:
    """Make an empty file beside another, with the permissions of a new file."""
    new = temporary_path(path.parent, temporary_prefix(path.name, "-"))
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return new


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
    # Not all systems can open or flush folders, and a folder that can be written may not be readable.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for each in (*folder.rglob("*"), folder):
        flush(each)


def similar_paths(name: str, folders_only: bool = False) -> str:
    """Return a question that names what lies beside a missing path under a similar name; empty if nothing does."""
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return ""
    try:
        beside = sorted(each.name for each in path.parent.iterdir() if each.is_dir() or not folders_only)
    except OSError:
        return ""
    near = [repr(str(Path(name).parent / each)) for each in difflib.get_close_matches(path.name, beside, n=3)]
    return f"did you mean {' or '.join(near)}?" if near else ""


def is_local_path(name: str) -> bool:
    """Return whether the name of a model or dataset is a path on this machine rather than a Hub id.

    A path stays one when nothing is there any more.
    """
    path = Path(name)
    return path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~")) or os.path.exists(path)
