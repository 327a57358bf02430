"""The folder of an unfinished run: opened for the very run that it belongs to, removed when the result is saved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from filelock import FileLock, Timeout

from ..reporting import REPORT_NAME
from ..runtime.distributed import Processes
from ..runtime.journal import ACTIVATIONS, Entry, Journal
from ..runtime.logging import get_logger
from ..runtime.version import __version__


if TYPE_CHECKING:
    from .run import CompressionRun

logger = get_logger(__name__)

_RUN = "run"

_LOCK = "lock"

_JOURNAL_FILES = re.compile(r"(.+\.safetensors|\..+\.safetensors-[a-z0-9_]{8}|lock)")

_LOCK_TIMEOUT = 10.0
"""Seconds: processes that a killed run had started may outlive it by some, and hold its lock so long."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

_MISSING = "nothing"


class UnfinishedRun:
    """A run whose progress is kept in a folder, from its start until its result is saved.

    Args:
        directory: The folder; it is made where there is none.
        identity: What the result depends on, JSON values by name.
        interval: Seconds between two savings of work that goes on.
        processes: Those that share the work; all make the object.

    Attributes:
        journal: For the entries of this process.

    Raises:
        ValueError: if the folder belongs to a run with another identity, or another process works on it now.
        FileExistsError: if it holds other files.
    """

    def __init__(
        self, directory: str | Path, identity: Mapping[str, Any], interval: float, processes: Processes
    ) -> None:
        directory = Path(directory).expanduser()
        self.journal = Journal(directory, interval, processes.index)
        self._is_main = processes.is_main
        self._identity = json.loads(json.dumps(dict(identity)))
        # Whoever gets past this point finds a folder that the main process has looked through.
        with processes.raise_on_all_ranks():
            if self._is_main:
                self._open(directory)

    def _open(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for each in directory.iterdir():
            if not _JOURNAL_FILES.fullmatch(each.name):
                raise FileExistsError(
                    f"The folder {str(directory)!r} for an unfinished run holds something else ({each.name!r}); name "
                    "another."
                )
        self._lock = _locked(directory)
        entry = self.journal.load(_RUN, shared=True)
        for each in directory.iterdir():
            # Without the identity of their run no entries can be trusted; unfinished files and activations are of no use.
            if each.name != _LOCK and (entry is None or each.name.startswith((".", ACTIVATIONS))):
                each.unlink()
        if entry is None:
            self._save(None)
            return
        _check(entry.values["identity"], self._identity, directory)
        logger.warning(f"Going on with the unfinished run in {str(directory)!r}.")

    def announce(self, folder: Path) -> None:
        """Note, before a complete checkpoint is moved to its place, that it is the result of this run."""
        self._save(_fingerprint(folder))

    def close(self) -> None:
        """Remove the folder, for the result is saved."""
        if self._is_main:
            assert self.journal.directory is not None  # given
            _remove(self.journal.directory, self._lock)

    def _save(self, result: str | None) -> None:
        self.journal.save(_RUN, {}, {"identity": self._identity, "result": result}, shared=True)


def discard(directory: str | Path) -> None:
    """Remove the folder of an unfinished run, if there is one.

    Raises:
        ValueError: if another process works on it now.
    """
    directory = Path(directory).expanduser()
    if directory.is_dir():
        _remove(directory, _locked(directory))


def _locked(directory: Path) -> FileLock | None:
    """The lock of a folder, taken; None where the file system knows no locks.

    It is let go when the process ends, however it ends, and taken again by the same process without waiting.
    """
    lock = FileLock(directory / _LOCK, timeout=_LOCK_TIMEOUT, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
        return lock
    except Timeout as error:
        raise ValueError(
            f"Another process works on the unfinished run in {str(directory)!r}. Wait until it ends, or name another "
            "output."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return None


def _remove(directory: Path, lock: FileLock | None) -> None:
    last, locked = Journal(directory).path(_RUN, shared=True), directory / _LOCK
    for each in directory.iterdir():
        if _JOURNAL_FILES.fullmatch(each.name) and each not in (last, locked):
            each.unlink(missing_ok=True)
    # Late, for without it nobody would know that the result beside the folder comes from it.
    last.unlink(missing_ok=True)
    # While it is held, for another process may wait for it and make its own; where that is not allowed, afterwards.
    with suppress(OSError):
        locked.unlink(missing_ok=True)
    if lock is not None:
        lock.release(force=True)
    with suppress(OSError):
        if os.name == "nt":
            locked.unlink(missing_ok=True)
        directory.rmdir()


def has_saved(directory: str | Path | None, output: str | Path) -> bool:
    """Whether what stands in `output` is the result of the run in `directory`, which was cut off right after saving."""
    if directory is None:
        return False
    entry = _load(Path(directory).expanduser())
    result = _fingerprint(Path(output).expanduser())
    return entry is not None and result is not None and entry.values["result"] == result


def check_images(journal: Journal, fingerprint: str, processes: Processes) -> None:
    """Check that images, now that they are decoded, are those of the run so far.

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
                f"{str(journal.directory)!r} had {before}. Give the same images in the same order, or start anew."
            )


def open_run(run: CompressionRun, directory: str | Path, interval: float, allow_tf32: bool) -> UnfinishedRun:
    """Keep the progress of a run in a folder, or go on with the run that was cut off there.

    Args:
        run: The run.
        directory: The folder.
        interval: Seconds between two savings of work that goes on.
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
    run.journal = unfinished.journal
    return unfinished


def _identity_of(run: CompressionRun, images: str | None, allow_tf32: bool) -> dict[str, Any]:
    """What the result of a compression depends on, JSON values by name."""
    model, image_processor = run.model, run.reader.image_processor
    settings = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "model": f"{type(model).__name__} {run.fingerprint}",
        "model's config.json": _digest(settings),
        "image processor": None if image_processor is None else _digest(_settings(image_processor)),
        **run.config.to_dict(),
        "batch_size": run.reader.batch_size,
        "max_broken_share": run.reader.max_broken_share,
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
        f"{name} was {before.get(name, _MISSING)!r} and is {now.get(name, _MISSING)!r}"
        for name in {**before, **now}
        if before.get(name, _MISSING) != now.get(name, _MISSING)
    ]
    if differences:
        raise ValueError(
            f"The unfinished run in {str(directory)!r} is another one: {'; '.join(differences)}. Go on with it as it was "
            "started, or start anew: on the command line with --no-resume, else by removing that folder."
        )


def _load(directory: Path) -> Entry | None:
    return Journal(directory).load(_RUN, shared=True) if directory.is_dir() else None


def _fingerprint(folder: Path) -> str | None:
    """Of the result in a folder: of its report, which holds times that no other run has had."""
    report = folder / REPORT_NAME
    return hashlib.sha256(report.read_bytes()).hexdigest() if report.is_file() else None


def _settings(image_processor: Any) -> Any:
    return image_processor.to_dict() if hasattr(image_processor, "to_dict") else type(image_processor).__name__


def _digest(values: Any) -> str:
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__).encode()
    ).hexdigest()
