"""Activations on disk, for more images than fit into memory."""

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
    """A call whose tensors stay in a file until it is made.

    Attributes:
        path: The file.
        devices: The devices of the tensors, by their names in the file: positions among `args`, or names in `kwargs`.
    """

    path: Path
    devices: Mapping[str, torch.device]

    def __call__(self, module: nn.Module) -> Any:
        """Read the tensors, and call a module with them."""
        # Cloned tensors are aligned in memory like those that were saved; results may depend on the alignment.
        tensors = {name: tensor.clone().to(self.devices[name]) for name, tensor in load_file(self.path).items()}
        args = [tensors.get(str(position), arg) for position, arg in enumerate(self.args)]
        return module(*args, **{name: tensors.get(name, value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Spill:
    """Stores the tensors of calls in files of a folder; their names hold that of the called model and the process."""

    directory: Path
    name: str
    process: int

    def __call__(self, index: int, call: Call) -> Call:
        """Move the tensors of the call with this number to a file, which replaces an earlier one.

        Raises:
            OSError: if the disk is full.
        """
        named = {**{str(position): arg for position, arg in enumerate(call.args)}, **call.kwargs}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        path, written = (
            self.directory / f"{ACTIVATIONS}{self.name}-{which}.{self.process}.safetensors" for which in (index, "new")
        )
        # The old file may still be mapped into memory, so it is replaced rather than overwritten.
        with explained_no_space(path):
            # safetensors refuses tensors that share memory.
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, written)
            written.replace(path)
        args = tuple(None if isinstance(arg, Tensor) else arg for arg in call.args)
        kwargs = {name: None if isinstance(value, Tensor) else value for name, value in call.kwargs.items()}
        return StoredCall(args, kwargs, path, {name: value.device for name, value in tensors.items()})


@contextmanager
def spilled(on_disk: bool, directory: Path | None = None, process: int = 0) -> Iterator[dict[str, Keep]]:
    """Store the calls of the original and of the compressed model in memory, or in files that are removed at the end.

    Args:
        on_disk: Whether to store them in files.
        directory: Folder for the files; by default a temporary one (see `TMPDIR`).
        process: Number of the process, for the names of the files.

    Yields:
        The `keep` argument of `SegmentReplay` for `"original"` and `"compressed"`.
    """
    models = ("original", "compressed")
    if not on_disk:
        yield dict.fromkeys(models, in_memory)
    elif directory is None:
        with tempfile.TemporaryDirectory(prefix="optimum-mixrank-", ignore_cleanup_errors=True) as temporary:
            yield {model: Spill(Path(temporary), model, process) for model in models}
    else:
        try:
            yield {model: Spill(directory, model, process) for model in models}
        finally:
            for path in directory.glob(f"{ACTIVATIONS}*.{process}.safetensors"):
                # Some systems do not remove files that are still mapped into memory.
                with suppress(OSError):
                    path.unlink(missing_ok=True)
