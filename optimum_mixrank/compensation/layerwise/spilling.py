"""Activations on the disk, for more images than fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...runtime.files import explained_no_space
from ...runtime.journal import ACTIVATIONS
from ..segments import Call, Keep, in_memory


@dataclass
class StoredCall(Call):
    """A call whose tensors lie in a file until it is made.

    Attributes:
        path: The file.
        devices: Where the tensors go, by their names in the file: positions among `args`, or names in `kwargs`.
    """

    path: Path
    devices: Mapping[str, torch.device]

    def __call__(self, module: nn.Module) -> Any:
        """Read the tensors, and call a module with them."""
        # Copies are aligned in memory as what they were saved from; arithmetic may depend on it.
        tensors = {name: tensor.clone().to(self.devices[name]) for name, tensor in load_file(self.path).items()}
        args = [tensors.get(str(position), arg) for position, arg in enumerate(self.args)]
        return module(*args, **{name: tensors.get(name, value) for name, value in self.kwargs.items()})


class Spill:
    """Keeps the tensors of calls in files, one for each call, in the place of those that the file held before.

    Args:
        name: Of the model that is called, for the names of the files.
        directory: Of the files; default: one of their own among the system's temporary files (`TMPDIR`), which is made
            with the first of them.
        process: Number of the process, each of which has files of its own.
    """

    def __init__(self, name: str, directory: Path | None = None, process: int = 0) -> None:
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._prefix, self._suffix = f"{ACTIVATIONS}{name}-", f".{process}.safetensors"

    def __call__(self, index: int, call: Call) -> Call:
        """Put the tensors of the call with this number into a file.

        Raises:
            OSError: if the disk is full.
        """
        named = {**{str(position): arg for position, arg in enumerate(call.args)}, **call.kwargs}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        path = self._folder() / f"{self._prefix}{index}{self._suffix}"
        # What was read from the file before may still be mapped into memory: it is replaced, not written over.
        written = path.with_name(f"{self._prefix}new{self._suffix}")
        with explained_no_space(path):
            # safetensors stores no tensor that shares its memory with another.
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, written)
            written.replace(path)
        args = tuple(None if isinstance(arg, Tensor) else arg for arg in call.args)
        kwargs = {name: None if isinstance(value, Tensor) else value for name, value in call.kwargs.items()}
        return StoredCall(args, kwargs, path, {name: value.device for name, value in tensors.items()})

    def clear(self) -> None:
        """Remove the files, as far as the system lets go of them."""
        if self._temporary is not None:
            self._temporary.cleanup()
        elif self._directory is not None:
            for path in self._directory.glob(f"{self._prefix}*{self._suffix}"):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _folder(self) -> Path:
        if self._directory is not None:
            return self._directory
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="optimum-mixrank-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)


@contextmanager
def spilled(wanted: bool, directory: Path | None = None, process: int = 0) -> Iterator[dict[str, Keep]]:
    """Where the calls of the original and of the compressed model are kept: in memory, or in files that go at the end.

    Args:
        wanted: Whether in files.
        directory: See `Spill`.
        process: See `Spill`.

    Yields:
        What a `SegmentReplay` keeps its calls by, for `"original"` and `"compressed"`.
    """
    models = ("original", "compressed")
    if not wanted:
        yield dict.fromkeys(models, in_memory)
        return
    spills = {model: Spill(model, directory, process) for model in models}
    try:
        yield {**spills}
    finally:
        for spill in spills.values():
            spill.clear()
