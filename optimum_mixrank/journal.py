"""What a long run has finished so far, on disk, so that the same run goes on after its end came too early.

An entry is a safetensors file with tensors and JSON values. It is complete or not there: it is written beside its place,
flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """What was saved under one name.

    Attributes:
        tensors: By name, on the host.
        values: JSON values.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass(eq=False)
class Journal:
    """The entries of one process of one run.

    Attributes:
        directory: Where they are; None keeps none: nothing is ever found or due.
        interval: Seconds between two entries of work that goes on.
        process: Number of the process; each has entries of its own.
    """

    directory: Path | None = None
    interval: float = 60.0
    process: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether so much time has passed since the last entry that the next one should be written."""
        return self.directory is not None and time.monotonic() - self._saved >= self.interval

    def load(self, name: str) -> Entry | None:
        """An entry; None if there is none.

        Raises:
            ValueError: if it is damaged.
        """
        if self.directory is None or not self._path(name).is_file():
            return None
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
                values = json.loads((file.metadata() or {})["values"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error!r}); remove {str(self.directory)!r} and start anew."
            ) from error
        return Entry(tensors, values)

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
        """Write an entry in the place of an earlier one of the same name.

        Args:
            name: Letters, digits, dots, dashes and underscores.
            tensors: Copied to the host.
            values: JSON values.

        Raises:
            OSError: if the disk is full, say; the earlier entry stays.
        """
        if self.directory is None:
            return
        content = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        with replaced_file(self._path(name)) as temporary:
            save_file(content, temporary, metadata={"values": json.dumps(dict(values or {}))})
        self._saved = time.monotonic()

    def remove(self, name: str) -> None:
        """Forget an entry that is not needed any more."""
        if self.directory is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.{self.process}.safetensors"


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file beside another, which takes its place when it has been written and is on the disk; else it goes."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files for the owner's eyes only; these are as readable as other new files.
        temporary.chmod(0o644)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_JOURNAL = Journal()
