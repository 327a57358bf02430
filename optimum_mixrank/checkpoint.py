"""Write a compressed checkpoint: model, image processor, reports and card, complete or not at all."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers.utils import logging

from .evaluation.size import check_stored_values, safetensors_bytes
from .modeling import FactoredLinear
from .reporting.card import model_card
from .reporting.report import HTML_NAME


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .reporting.report import CompressionReport


logger = logging.get_logger(__name__)


def writable_directory(directory: str | Path, overwrite: bool) -> Path:
    """Check, before any work, that a checkpoint can go there.

    Raises:
        FileExistsError: if it holds files and may not be overwritten.
        NotADirectoryError: if it is a file.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_directory={str(directory)!r} is a file; name a folder.")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(
            f"save_directory={str(directory)!r} is not empty; choose another, or pass overwrite=True to replace it."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    return directory


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    image_processor: Any,
    report: CompressionReport | None,
    *,
    overwrite: bool = False,
    **kwargs: Any,
) -> CompressionReport | None:
    """Write the checkpoint beside its destination and move it there when it is complete.

    Returns:
        The report with the bytes on disk filled in.

    Raises:
        ValueError: if the model is not compressed, or the files hold something else than the model.
        FileExistsError: see `writable_directory`.
    """
    if not any(isinstance(module, FactoredLinear) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} holds no factored layer; save a dense model with its own `save_pretrained`."
        )
    with _complete_or_not_at_all(directory, overwrite) as temporary:
        model.save_pretrained(temporary, **kwargs)
        check_stored_values(model, temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)
        if report is not None:
            report = dataclasses.replace(report, bytes_on_disk_after=safetensors_bytes(temporary))
            report.save(temporary)
            _save_page(report, temporary)
            model_card(model, report).save(temporary / "README.md")
    return report


def _save_page(report: CompressionReport, directory: Path) -> None:
    try:
        report.save_html(directory)
    except Exception as error:
        # What took hours is not given up for a picture that could not be drawn.
        logger.warning(f"The checkpoint is saved without its page {HTML_NAME!r}, which could not be made: {error}")


def save_dense(
    model: PreTrainedModel, directory: str | Path, image_processor: Any, *, overwrite: bool = False
) -> None:
    """Write a dense model with its image processor, complete or not at all.

    Raises:
        FileExistsError: see `writable_directory`.
    """
    with _complete_or_not_at_all(directory, overwrite) as temporary:
        model.save_pretrained(temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)


@contextmanager
def _complete_or_not_at_all(directory: str | Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the destination that takes its place when everything has been written."""
    destination = writable_directory(directory, overwrite)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        # mkdtemp makes folders for the owner's eyes only; a checkpoint is as readable as other new folders.
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            # Some releases of safetensors write files for the owner's eyes only.
            file.chmod(0o755 if file.is_dir() else 0o644)
        _move(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push_checkpoint(
    model: PreTrainedModel,
    repo_id: str,
    image_processor: Any,
    report: CompressionReport | None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model compressed with optimum-mixrank",
    **kwargs: Any,
) -> Any:
    """Save to a temporary folder and upload it; see `MixRankCompressor.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        save_checkpoint(model, directory, image_processor, report, **kwargs)
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repository.repo_id, folder_path=directory, revision=revision, commit_message=commit_message
        )


def _move(source: Path, destination: Path) -> None:
    """Put a folder in the place of another; the old one goes only when the new one stands."""
    if not destination.exists():
        source.rename(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}-old-", dir=destination.parent))
    destination.rename(old / "checkpoint")
    try:
        source.rename(destination)
    except OSError:
        (old / "checkpoint").rename(destination)
        raise
    shutil.rmtree(old)
