"""The finished work of a long run, on disk, so that the run can be continued if it is cut off.

An entry is a safetensors file with tensors and JSON values, and is always complete: see `files.replaced_file`. A digest
in it tells whether it still holds what was saved, and the mark of its run whether it belongs there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .digest import digest_content
from .files import replaced_file
from .formatting import quote


ACTIVATIONS = "activations-"
"""Prefix of the names of files beside the entries that are of no use to a continued run."""


@dataclass(frozen=True)
class Entry:
    """The content of an entry: tensors, on the CPU, and JSON values, by name; and the mark of its run."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    run: str


@dataclass
class _Clock:
    """When a journal or one of its parts last saved an entry."""

    saved: float


@dataclass(eq=False)
class Journal:
    """The entries of one process of a run.

    Attributes:
        directory: Folder of the entries; with None nothing is kept, found or due.
        interval: Seconds between two entries about work in progress.
        process: Index of the process. Each process has entries of its own. Shared ones are written by the main process
            and read by all.
        prefix: Prefix of the names of all entries, for one part of the run.
        run: Mark of the run, which all its entries bear; None reads those of any run.
    """

    directory: Path | None = None
    interval: float = 60.0
    process: int = 0
    prefix: str = ""
    run: str | None = None
    _clock: _Clock = field(default_factory=lambda: _Clock(time.monotonic()))

    @property
    def is_kept(self) -> bool:
        """Whether anything is written at all."""
        return self.directory is not None

    def part(self, name: str) -> Journal:
        """Return the journal of one part of the run, whose entries have names of their own."""
        return replace(self, prefix=f"{self.prefix}{name}-")

    def due(self) -> bool:
        """Whether `interval` has passed since the last entry, so that work in progress should be saved."""
        return self.directory is not None and time.monotonic() - self._clock.saved >= self.interval

    def load(self, name: str, shared: bool = False) -> Entry | None:
        """Return an entry; None if there is none.

        Raises:
            ValueError: if it is damaged or belongs to another run.
        """
        if self.directory is None or not os.path.isfile(self.path(name, shared)):
            return None
        path = self.path(name, shared)
        try:
            with safe_open(path, framework="pt") as file:
                # Copies are aligned in memory as the saved tensors were; results may depend on it.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
                metadata = file.metadata() or {}
            if metadata["digest"] != digest_content(tensors, path.name, metadata["run"], metadata["values"]):
                raise ValueError("its content is not what was saved under this name")
            values = json.loads(metadata["values"])
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise self.damaged(path, error) from error
        if self.run not in (None, metadata["run"]):
            raise ValueError(
                f"{str(path)!r} belongs to another run; remove {str(self.directory)!r} and start over, and leave the files "
                "in it alone."
            )
        return Entry(tensors, values, metadata["run"])

    def damaged(self, path: Path, error: Exception) -> ValueError:
        """Return the error for a file of the run that cannot be read."""
        return ValueError(f"{str(path)!r} is damaged ({quote(error)}); remove {str(self.directory)!r} and start over.")

    def save(
        self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None, shared: bool = False
    ) -> None:
        """Write an entry, replacing an earlier one of the same name.

        Args:
            name: Letters, digits, dashes and underscores.
            tensors: Tensors by name, on any device.
            values: JSON values by name.
            shared: Whether it is the same for all processes; only the main one then writes it.

        Raises:
            OSError: if it cannot be written, for instance because the disk is full; the earlier entry is unchanged.
        """
        if self.directory is None or (shared and self.process):
            return
        content: dict[str, Tensor] = {}
        places: set[int] = set()
        for key, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            # safetensors refuses tensors that share memory.
            place = tensor.untyped_storage().data_ptr()
            content[key] = tensor.clone() if place in places else tensor
            places.add(place)
        path, run, text = self.path(name, shared), self.run or "", json.dumps(dict(values or {}))
        metadata = {"values": text, "run": run, "digest": digest_content(content, path.name, run, text)}
        with replaced_file(path) as temporary:
            save_file(content, temporary, metadata=metadata)
        self._clock.saved = time.monotonic()

    def clear(self) -> None:
        """Remove all entries of this part and process; the main process also removes shared ones."""
        if self.directory is None:
            return
        for path in self.directory.glob(f"{self.prefix}*.safetensors"):
            if path.name.endswith(f".{self.process}.safetensors") or (self.process == 0 and path.name.count(".") == 1):
                path.unlink(missing_ok=True)

    def path(self, name: str, shared: bool = False) -> Path:
        """Return the file of an entry."""
        if self.directory is None:
            raise ValueError("A journal that is not kept has no files.")
        return self.directory / f"{self.prefix}{name}{'' if shared else f'.{self.process}'}.safetensors"


NO_JOURNAL = Journal()
