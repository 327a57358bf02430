"""Which runtime a file belongs to."""

from __future__ import annotations

from pathlib import Path

from ..runtime.formatting import shorten
from ..runtime.registry import RUNTIMES
from .target import ExportedModel


def find_exported(path: str | Path) -> tuple[str, Path] | None:
    """Return the runtime and the file of an exported model, or None for a checkpoint.

    Args:
        path: A file, whose ending says what it is, or a folder, which may hold one under the name that `export_model`
            gives it.

    Raises:
        ValueError: for a file of another kind, or a folder that holds models of several runtimes.
    """
    path = Path(path).expanduser()
    names = {name: RUNTIMES[name].file_name for name in RUNTIMES}
    if path.is_file():
        for name, file_name in names.items():
            if path.suffix == Path(file_name).suffix:
                return name, path
        endings = ", ".join(Path(file_name).suffix for file_name in names.values())
        raise ValueError(f"{str(path)!r} is not an exported model: its name must end in one of {endings}.")
    found = [(name, path / file_name) for name, file_name in names.items() if (path / file_name).is_file()]
    if len(found) > 1:
        listed = ", ".join(file.name for _, file in found)
        raise ValueError(f"{str(path)!r} holds several exported models ({listed}); name one of the files.")
    return found[0] if found else None


def open_exported(path: str | Path) -> ExportedModel:
    """Open an exported model, to be called with `pixel_values=…`; it runs on the CPU, with PyTorch's number of threads.

    Args:
        path: An ONNX file, an OpenVINO `.xml`, an ExecuTorch `.pte`, a `.pt2` of `torch.export` (which can run code: open
            only what you trust), or a folder that holds one of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the runtime is not installed.
        ValueError: if it is another kind of file, one that is damaged, or a model that takes more than images.
    """
    found = find_exported(path)
    if found is None:
        raise FileNotFoundError(f"{str(path)!r} holds no exported model.")
    name, file = found
    runtime = RUNTIMES.create(name)
    runtime.check_packages()
    try:
        return runtime.open(file)
    except (ImportError, MemoryError, ValueError):
        raise
    except Exception as error:
        # Every runtime has exceptions of its own for files that it cannot read.
        raise ValueError(
            f"{str(file)!r} cannot be opened: it is damaged, or lacks files that belong to it; export the model again. "
            f"({shorten(str(error))})"
        ) from error
