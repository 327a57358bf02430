"""The folder of an unfinished run: opened only by the run that it belongs to, removed once the result is saved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from filelock import FileLock, Timeout

from ..checkpoint.saving import check_apart, writable_directory
from ..reporting import REPORT_NAME
from ..runtime.distributed import Processes
from ..runtime.folders import check_writable_folder, resolved
from ..runtime.journal import ACTIVATIONS, Entry, Journal
from ..runtime.logging import get_logger
from ..runtime.version import __version__
from .costs import table_of


if TYPE_CHECKING:
    from .run import CompressionRun

logger = get_logger(__name__)

_RUN = "run"

_LOCK = "lock"

_NAMES = rf"run|images|scales|compensated|statistics-[0-9a-f]{{8}}|step\d+-[\w-]+|{ACTIVATIONS}[\w-]+"
_ENTRY = rf"({_NAMES})(\.\d+)?\.safetensors"

_OURS = re.compile(rf"{_ENTRY}|\.{_ENTRY}-[a-z0-9_]{{8}}|{_LOCK}")
"""Names of all files of a run, and of temporary ones."""

_BEFORE_RUN = re.compile(rf"\.{_RUN}\.safetensors-[a-z0-9_]{{8}}|{_LOCK}")
"""Names of the files that are there before `run.safetensors`, by which the folder is known."""

_LOCK_TIMEOUT = 10.0
"""Seconds. Processes started by a run that was killed may outlive it for a while and hold its lock."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

_MISSING = "unset"

_DIGEST = re.compile(r"(.* )?[0-9a-f]{32,}")
"""A value that says nothing to a reader but that it has changed."""

_WITHOUT_PROGRESS = re.compile(rf"(run|images)(\.\d+)?\.safetensors|{_LOCK}")
"""Names of the files of a run in which nothing was finished."""


class UnfinishedRun:
    """A run whose progress is kept in a folder, from its start until its result is saved.

    Args:
        directory: The folder; created if it does not exist.
        identity: Everything that the result depends on, as JSON values by name.
        interval: Seconds between two saves of work in progress.
        processes: The processes that share the work; all of them create the object.

    Attributes:
        journal: The journal of this process.

    Raises:
        ValueError: if the folder belongs to a run with another identity, or another process is working on it.
        FileExistsError: if it holds other files.
    """

    def __init__(
        self, directory: str | Path, identity: Mapping[str, Any], interval: float, processes: Processes
    ) -> None:
        directory = resolved(directory)
        self.journal = Journal(directory, interval, processes.index)
        self._is_main = processes.is_main
        self._identity = json.loads(json.dumps(dict(identity)))
        # No process goes on before the main one has checked the folder.
        with processes.raise_on_all_ranks():
            if self._is_main:
                self._open(directory)
        self.journal.run = processes.broadcast(self.journal.run)

    def _open(self, directory: Path) -> None:
        check_progress(directory)
        directory.mkdir(exist_ok=True)
        self._lock = _locked(directory)
        entry = self.journal.load(_RUN, shared=True)
        for each in directory.iterdir():
            # Entries without the identity of their run cannot be trusted; partial files and activations are useless.
            if each.name != _LOCK and (entry is None or each.name.startswith((".", ACTIVATIONS))):
                each.unlink()
        if entry is None:
            self.journal.run = secrets.token_hex(16)
            self._save(None)
            return
        _check(entry.values["identity"], self._identity, directory)
        self.journal.run = entry.run
        logger.warning(f"Resuming the unfinished run in {str(directory)!r}.")

    def announce(self, folder: Path) -> None:
        """Record that a complete checkpoint is the result of this run, before it is moved to its destination."""
        self._save(_fingerprint(folder))

    def close(self) -> None:
        """Remove the folder, since the result is saved."""
        if self._is_main:
            assert self.journal.directory is not None  # given
            _remove(self.journal.directory, self._lock)

    def leave(self) -> None:
        """Remove the folder if nothing was finished, so that a run that failed at its start does not bind the next one.

        A folder that cannot be read or removed stays: what is to be reported is why the run failed.
        """
        directory = self.journal.directory
        assert directory is not None  # given
        with suppress(OSError):
            if self._is_main and all(map(_WITHOUT_PROGRESS.fullmatch, os.listdir(directory))):
                _remove(directory, self._lock)

    def _save(self, result: str | None) -> None:
        self.journal.save(_RUN, {}, {"identity": self._identity, "result": result}, shared=True)


def discard(directory: str | Path) -> None:
    """Remove the folder of an unfinished run, if there is one.

    Raises:
        ValueError: if another process is working on it.
    """
    directory = resolved(directory)
    if directory.is_dir():
        check_progress(directory)
        _remove(directory, _locked(directory))


def check_progress(directory: str | Path) -> None:
    """Check that the progress of a run can be kept in a folder, which holds nothing else; make its parents.

    Raises:
        FileExistsError: if it holds something else, or is a file.
        OSError: if it cannot be written.
        ValueError: if what tells the run is damaged.
    """
    folder = resolved(directory)
    try:
        check_writable_folder(folder)
        held = os.listdir(folder) if folder.is_dir() else []
    except OSError as error:
        raise OSError(
            f"The progress of the run cannot be kept in {str(directory)!r} ({error.strerror}); choose another folder."
        ) from error
    # Where no run is recorded, only what is written before it is ours. Nothing is ever written into the lock.
    names = _OURS if _run_in(folder) is not None else _BEFORE_RUN
    for name in sorted(held):
        path = folder / name
        if not names.fullmatch(name) or not path.is_file() or (name == _LOCK and path.stat().st_size):
            raise FileExistsError(
                f"The folder {str(directory)!r} for an unfinished run holds other files ({name!r}); choose another "
                "folder, or move that elsewhere."
            )


def _run_in(folder: Path) -> Entry | None:
    """Return the record of the run that a folder belongs to; None if there is none."""
    try:
        entry = Journal(folder).load(_RUN, shared=True)
    except ValueError:
        if (folder / _LOCK).exists():
            raise
        return None
    return entry if entry is not None and "identity" in entry.values else None


def _locked(directory: Path) -> FileLock | None:
    """Take the lock of a folder; return None where the file system does not support locks.

    The lock is released when the process ends, however it ends, and the same process can take it again at once.
    """
    lock = FileLock(directory / _LOCK, timeout=_LOCK_TIMEOUT, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
        return lock
    except Timeout as error:
        raise ValueError(
            f"Another process is working on the unfinished run in {str(directory)!r}. Wait until it ends, or choose "
            "another output."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return None


def _remove(directory: Path, lock: FileLock | None) -> None:
    last, locked = Journal(directory).path(_RUN, shared=True), directory / _LOCK
    for each in directory.iterdir():
        if _OURS.fullmatch(each.name) and each not in (last, locked):
            each.unlink(missing_ok=True)
    # Last, since it alone tells that the saved result comes from this run.
    last.unlink(missing_ok=True)
    # While it is held, since another process may be waiting to create its own; Windows only allows it afterwards.
    with suppress(OSError):
        locked.unlink(missing_ok=True)
    if lock is not None:
        lock.release(force=True)
    with suppress(OSError):
        if os.name == "nt":
            locked.unlink(missing_ok=True)
        directory.rmdir()


def check_output(
    directory: str | Path | None,
    overwrite: bool,
    resume_directory: str | Path | None,
    processes: Processes,
    sources: Mapping[str, Iterable[str | Path]],
) -> None:
    """Check, before any work, that the result can be saved.

    Args:
        directory: The destination, or None if the result is not to be saved.
        overwrite: Whether it may hold files. The result of the same run, saved just before it was cut off, is allowed.
        resume_directory: The folder with the progress of the run.
        processes: The processes that share the work.
        sources: What the run reads; see `check_apart`.

    Raises:
        FileExistsError: in all processes, if the folder holds files that may not be overwritten.
        ValueError: as `writable_directory`, and as `check_progress`.
    """
    with processes.raise_on_all_ranks():
        if resume_directory is not None and processes.is_main:
            check_apart(resume_directory, sources, "resume_directory")
            check_progress(resume_directory)
        if directory is not None and processes.is_main:
            overwrite = overwrite or has_saved(resume_directory, directory)
            writable_directory(directory, overwrite, resume_directory, sources)


def has_saved(directory: str | Path | None, output: str | Path) -> bool:
    """Return whether `output` holds the result of the run in `directory`, which was cut off right after saving it."""
    if directory is None:
        return False
    entry = _run_in(resolved(directory))
    result = _fingerprint(resolved(output))
    return entry is not None and result is not None and entry.values["result"] == result


def check_images(journal: Journal, fingerprint: str, processes: Processes) -> None:
    """Check that the decoded images are those that the run started with.

    Raises:
        ValueError: if they are not.
    """
    with processes.raise_on_all_ranks():
        entry = journal.load("images", shared=True)
        before = None if entry is None else entry.values["fingerprint"]
        if before is None:
            journal.save("images", {}, {"fingerprint": fingerprint}, shared=True)
        elif before != fingerprint:
            raise ValueError(
                f"The calibration images have the fingerprint {fingerprint}, those of the unfinished run in "
                f"{str(journal.directory)!r} had {before}. Pass the same images in the same order, or start over."
            )


def open_run(run: CompressionRun, directory: str | Path, interval: float, allow_tf32: bool) -> UnfinishedRun:
    """Keep the progress of a run in a folder, or resume the run that was cut off there.

    Args:
        run: The run; it gets the journal of the folder.
        directory: The folder.
        interval: Seconds between two saves of work in progress.
        allow_tf32: Whether statistics may be multiplied in TF32.

    Raises:
        ValueError: if the folder belongs to another run.
    """
    processes, images = run.processes, None
    with processes.raise_on_all_ranks():
        if run.batches is not None and processes.is_main:
            images = run.batches.source_fingerprint()
    images = processes.broadcast(images)
    unfinished = UnfinishedRun(directory, _identity_of(run, images, allow_tf32), interval, processes)
    run.journal, run.images_known = unfinished.journal, images is not None
    return unfinished


def _identity_of(run: CompressionRun, images: str | None, allow_tf32: bool) -> dict[str, Any]:
    """Return everything that the result of a compression depends on, as JSON values by name."""
    model, image_processor = run.model, run.reader.image_processor
    settings = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "model": f"{type(model).__name__} {run.fingerprint}",
        "model's config.json": _digest(settings),
        "image processor": None if image_processor is None else _digest(_settings(image_processor)),
        **run.config.to_dict(),
        "latencies": _digest(table_of(run.budget.costs)),
        "batch_size": run.reader.batch_size,
        "max_broken_share": run.reader.max_broken_share,
        "max_image_pixels": run.reader.max_image_pixels,
        "statistics": None if run.calibration is None else run.calibration.data_fingerprint,
        "num_images": None if run.batches is None else run.batches.num_images,
        "images": images,
        "processes": run.processes.count,
        "mixed_precision": run.processes.mixed_precision,
        "allow_tf32": allow_tf32,
        "optimum-mixrank": __version__,
        "PyTorch": torch.__version__,
        "Transformers": transformers.__version__,
        "device": next(model.parameters()).device.type,
    }


def _check(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    differences = [
        _difference(name, *(_shown(values, name) for values in (before, now)))
        for name in {**before, **now}
        if before.get(name) != now.get(name) or (name in before) != (name in now)
    ]
    if differences:
        raise ValueError(
            f"The unfinished run in {str(directory)!r} is a different one: {'; '.join(differences)}. Resume it as it was "
            "started, or start over: with --no-resume on the command line, otherwise by removing that folder."
        )


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else _MISSING


def _difference(name: str, before: str, now: str) -> str:
    if any(_DIGEST.fullmatch(each.strip("'")) for each in (before, now)):
        return f"{name} changed"
    return f"{name} was {before} and is {now}"


def _fingerprint(folder: Path) -> str | None:
    """Return a digest of the report in a folder, whose timings no other run has; None if there is no report."""
    report = folder / REPORT_NAME
    return hashlib.sha256(report.read_bytes()).hexdigest() if report.is_file() else None


def _settings(image_processor: Any) -> Any:
    return image_processor.to_dict() if hasattr(image_processor, "to_dict") else type(image_processor).__name__


def _digest(values: Any) -> str:
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__).encode()
    ).hexdigest()
