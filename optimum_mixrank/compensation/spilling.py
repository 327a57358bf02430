"""Activations on the disk, for more images than fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..journal import explained_no_space
from .segments import Call, Keep, in_memory


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


@contextmanager
def spilled(wanted: bool, directory: Path | None = None, process: int = 0) -> Iterator[dict[str, Keep]]:
    """Where the calls of the original and of the compressed model are kept: in memory, or in files that go at the end.

    Args:
        wanted: Whether in files.
        directory: Of the files; default: one of their own among the system's temporary files (`TMPDIR`).
        process: Number of the process, each of which has files of its own.

    Yields:
        What a `SegmentReplay` keeps its calls by, for `"original"` and `"compressed"`.

    Raises:
        OSError: if the disk is full.
    """
    models = ("original", "compressed")
    if not wanted:
        yield dict.fromkeys(models, in_memory)
        return
    with tempfile.TemporaryDirectory(prefix="optimum-mixrank-", ignore_cleanup_errors=True) as temporary:
        stores = [_Store(directory or Path(temporary), f"activations-{model}-", f".{process}") for model in models]
        try:
            yield {model: store.keep for model, store in zip(models, stores, strict=True)}
        finally:
            for store in stores:
                store.clear()


@dataclass
class _Store:
    """Files of calls, one for each number.

    Attributes:
        directory: Where they are.
        prefix: Of their names, before the number.
        suffix: Of their names, behind it.
    """

    directory: Path
    prefix: str
    suffix: str

    def keep(self, index: int, call: Call) -> Call:
        """Put the tensors of a call into a file, in the place of those that it held before."""
        named = {**{str(position): arg for position, arg in enumerate(call.args)}, **call.kwargs}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        path = self.directory / f"{self.prefix}{index}{self.suffix}.safetensors"
        # What was read from the file before may still be mapped into memory: it is replaced, not written over.
        written = path.with_name(f"{self.prefix}new{self.suffix}.safetensors")
        with explained_no_space(path):
            # safetensors stores no tensor that shares its memory with another.
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, written)
            written.replace(path)
        args = tuple(None if isinstance(arg, Tensor) else arg for arg in call.args)
        kwargs = {name: None if isinstance(value, Tensor) else value for name, value in call.kwargs.items()}
        return StoredCall(args, kwargs, path, {name: value.device for name, value in tensors.items()})

    def clear(self) -> None:
        """Remove the files."""
        for path in self.directory.glob(f"{self.prefix}*{self.suffix}.safetensors"):
            path.unlink(missing_ok=True)
