"""What a long run has finished so far, on disk, so that the same run goes on after its end came too early.

An entry is a safetensors file with tensors and JSON values. It is complete or not there: it is written beside its place,
flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replaced_file


ACTIVATIONS = "activations-"
"""Beginning of the names of files beside the entries that are of no use to a run that goes on."""


@dataclass(frozen=True)
class Entry:
    """What was saved under one name.

    Attributes:
        tensors: By name, on the host.
        values: JSON values.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass
class _Clock:
    """When an entry was saved last, by the journal or one of its parts."""

    saved: float


@dataclass(eq=False)
class Journal:
    """The entries of one process of one run.

    Attributes:
        directory: Where they are; None keeps none: nothing is ever found or due.
        interval: Seconds between two entries of work that goes on.
        process: Number of the process. Each has entries of its own beside those that are shared: these the main process
            writes and all read.
        prefix: Of the names of all entries, for one part of the run.
    """

    directory: Path | None = None
    interval: float = 60.0
    process: int = 0
    prefix: str = ""
    _clock: _Clock = field(default_factory=lambda: _Clock(time.monotonic()))

    @property
    def is_kept(self) -> bool:
        """Whether anything is written at all."""
        return self.directory is not None

    def part(self, name: str) -> Journal:
        """The journal of one part of the run, whose entries have names of their own."""
        return replace(self, prefix=f"{self.prefix}{name}-")

    def due(self) -> bool:
        """Whether so much time has passed since the last entry that the next one should be written."""
        return self.directory is not None and time.monotonic() - self._clock.saved >= self.interval

    def load(self, name: str, shared: bool = False) -> Entry | None:
        """An entry; None if there is none.

        Raises:
            ValueError: if it is damaged.
        """
        if self.directory is None or not self.path(name, shared).is_file():
            return None
        path = self.path(name, shared)
        try:
            with safe_open(path, framework="pt") as file:
                # Copies are aligned in memory as what they were saved from; arithmetic may depend on it.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
                values = json.loads((file.metadata() or {})["values"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error!r}); remove {str(self.directory)!r} and start anew."
            ) from error
        return Entry(tensors, values)

    def save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any] | None = None,
        shared: bool = False,
    ) -> None:
        """Write an entry in the place of an earlier one of the same name.

        Args:
            name: Letters, digits, dashes and underscores.
            tensors: Copied to the host.
            values: JSON values.
            shared: Whether it is the same for all processes; the main one alone writes it then.

        Raises:
            OSError: if the disk is full, say; the earlier entry stays.
        """
        if self.directory is None or (shared and self.process):
            return
        content: dict[str, Tensor] = {}
        places: set[int] = set()
        for key, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            # safetensors stores no tensor that shares its memory with another.
            place = tensor.untyped_storage().data_ptr()
            content[key] = tensor.clone() if place in places else tensor
            places.add(place)
        with replaced_file(self.path(name, shared)) as temporary:
            save_file(content, temporary, metadata={"values": json.dumps(dict(values or {}))})
        self._clock.saved = time.monotonic()

    def remove(self, name: str, shared: bool = False) -> None:
        """Forget an entry that is not needed any more."""
        if self.directory is not None and not (shared and self.process):
            self.path(name, shared).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all entries of this part of the run, of this process and, in the main one, the shared ones."""
        if self.directory is None:
            return
        for path in self.directory.glob(f"{self.prefix}*.safetensors"):
            if path.name.endswith(f".{self.process}.safetensors") or (self.process == 0 and path.name.count(".") == 1):
                path.unlink(missing_ok=True)

    def path(self, name: str, shared: bool = False) -> Path:
        """The file of an entry."""
        if self.directory is None:
            raise ValueError("A journal that is not kept has no files.")
        return self.directory / f"{self.prefix}{name}{'' if shared else f'.{self.process}'}.safetensors"


NO_JOURNAL = Journal()


def flatten(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several owners as one mapping; names of tensors hold no slash."""
    return {f"{owner}/{name}": tensor for owner, state in states.items() for name, tensor in state.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flatten`."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition("/")
        states.setdefault(owner, {})[name] = tensor
    return states
