"""Write a compressed checkpoint: model, image processor, reports and card, complete or not at all."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from .evaluation.size import check_stored_values, safetensors_bytes, stored_dtype
from .journal import explained_no_space
from .messages import get_logger
from .modeling import FactoredLinear
from .reporting import HTML_NAME, RANKS_NAME, plot_ranks
from .reporting.card import model_card
from .swap import flush_tree, put_in_place, recover, remove_leftovers, temporary_prefix


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .reporting.report import CompressionReport


logger = get_logger(__name__)


def writable_directory(directory: str | Path, overwrite: bool) -> Path:
    """Check, before any work, that a checkpoint can go there.

    Raises:
        FileExistsError: if it holds files and may not be overwritten.
        NotADirectoryError: if it is a file.
    """
    directory = Path(directory).expanduser()
    recover(directory)
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
    picture: bool = False,
    announce: Callable[[Path], None] | None = None,
    **kwargs: Any,
) -> CompressionReport | None:
    """Write the checkpoint beside its destination and move it there when it is complete.

    Args:
        model: The compressed model.
        directory: The destination.
        image_processor: To save with it, or None.
        report: To save with it, or None.
        overwrite: Whether the destination may hold files.
        picture: Whether to save the picture of the ranks too.
        announce: Called with the complete folder before it is moved.
        **kwargs: Of Transformers' `save_pretrained`.

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
    with _complete_or_not_at_all(directory, overwrite, announce) as temporary:
        model.save_pretrained(temporary, **kwargs)
        check_stored_values(model, temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)
        if report is not None:
            report = dataclasses.replace(
                report,
                bytes_on_disk_after=safetensors_bytes(temporary),
                dtype_on_disk_after=stored_dtype(temporary),
            )
            report.save(temporary)
            _save_pictures(report, temporary, picture)
            model_card(model, report).save(temporary / "README.md")
    return report


def _save_pictures(report: CompressionReport, directory: Path, picture: bool) -> None:
    """The page, and the picture of the ranks if it is asked for."""
    savers: dict[str, Callable[[], Any]] = {HTML_NAME: lambda: report.save_html(directory)}
    if picture:
        savers[RANKS_NAME] = lambda: plot_ranks(report, directory / RANKS_NAME)
    for name, save in savers.items():
        try:
            save()
        except Exception as error:
            # What took hours is not given up for a picture that could not be drawn.
            logger.warning(f"The checkpoint is saved without {name!r}, which could not be made: {error}")


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
def _complete_or_not_at_all(
    directory: str | Path, overwrite: bool, announce: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A folder beside the destination that takes its place when everything has been written and is on the disk."""
    destination = writable_directory(directory, overwrite)
    remove_leftovers(destination)
    with explained_no_space(destination):
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(destination), dir=destination.parent))
        try:
            # mkdtemp makes folders for the owner's eyes only; a checkpoint is as readable as other new folders.
            temporary.chmod(0o755)
            yield temporary
            for file in temporary.rglob("*"):
                # Some releases of safetensors write files for the owner's eyes only.
                file.chmod(0o755 if file.is_dir() else 0o644)
            flush_tree(temporary)
            if announce is not None:
                announce(temporary)
            put_in_place(temporary, destination)
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
