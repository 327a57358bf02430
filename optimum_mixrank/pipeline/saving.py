"""Save a compressed model together with its report, page, picture and model card."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.files import read_json, safetensors_bytes, stored_dtype
from ..checkpoint.replacing import CARD_NAME
from ..checkpoint.saving import save_checkpoint
from ..checkpoint.self_contained import needs_of
from ..reporting import HTML_NAME, RANKS_NAME, REPORT_NAME, CompressionReport, plot_ranks
from ..reporting.card import card_with_evaluation, model_card
from ..reporting.data import write_text
from ..runtime.access import why_unreachable
from ..runtime.folders import resolved
from ..runtime.formatting import counted, format_count
from ..runtime.logging import get_logger
from ..runtime.phases import phase
from .unfinished import UnfinishedRun, has_saved


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

_COMMIT = ("revision", "commit_message", "commit_description", "create_pr")
"""Arguments of an upload that concern its commit."""

_UPLOAD = ("repo_id", "token", "private", "tags", *_COMMIT)
"""Arguments of an upload, as Transformers' `save_pretrained` takes them."""


def save_result(
    model: PreTrainedModel,
    directory: str | Path,
    image_processor: Any,
    report: CompressionReport | None,
    run: UnfinishedRun | None,
    *,
    overwrite: bool = False,
    **kwargs: Any,
) -> CompressionReport | None:
    """Save the result of a run, and remove the folder that kept its progress.

    Args:
        model: See `save_compressed`.
        directory: See `save_compressed`; it may hold the result of the same run, saved just before it was cut off.
        image_processor: See `save_compressed`.
        report: See `save_compressed`.
        run: The run, if its progress was kept.
        overwrite: Whether the destination may hold other files, of which an old checkpoint is replaced.
        **kwargs: See `save_compressed`.
    """
    with phase("Saved") as saving:
        is_own = run is not None and has_saved(run.journal.directory, directory)
        kwargs |= {"overwrite": overwrite or is_own}
        if run is not None:
            kwargs |= {"announce": run.announce, "progress": run.journal.directory}
        report = save_compressed(model, directory, image_processor, report, **kwargs)
        saving.add_detail(str(directory), f"{format_count(safetensors_bytes(resolved(directory)))}B")
    if run is not None:
        run.close()
    return report


def save_compressed(
    model: PreTrainedModel,
    directory: str | Path,
    image_processor: Any,
    report: CompressionReport | None,
    *,
    picture: bool = False,
    name: str | None = None,
    **kwargs: Any,
) -> CompressionReport | None:
    """Save a compressed model, its image processor and its report, complete or not at all.

    Args:
        model: The compressed model.
        directory: The destination.
        image_processor: To save with it, or None.
        report: To save with it, or None.
        picture: Whether to save the picture of the ranks too.
        name: What the card calls the model; default: the name of the folder.
        **kwargs: See `save_checkpoint`; `self_contained` says whether the checkpoint brings the code that opens it.

    Returns:
        The report with the bytes on disk filled in.

    Raises:
        ValueError: as `save_checkpoint`.
        FileExistsError: as `save_checkpoint`.
    """
    written = report

    def describe(folder: Path) -> None:
        nonlocal written
        if report is not None:
            written = dataclasses.replace(
                report, bytes_on_disk_after=safetensors_bytes(folder), dtype_on_disk_after=stored_dtype(folder)
            )
            written.save(folder)
            _save_pictures(written, folder, picture)
            _save_card(model, written, folder, name or resolved(directory).name)

    save_checkpoint(model, directory, image_processor, describe=describe, **kwargs)
    return written


def record_evaluation(folder: str | Path, evaluation: Mapping[str, Any], original: str) -> bool:
    """Add an evaluation to the report, the page and the card of a checkpoint that was saved before.

    Args:
        folder: The checkpoint.
        evaluation: The fields of `EvaluationResult`.
        original: Name of the model that the checkpoint was compared with.

    Returns:
        Whether the folder holds a report of a compression of that model and could be written.
    """
    folder = resolved(folder)
    try:
        report = CompressionReport.load(folder)
        if report.model_name != original:
            return False
        if _says_more(report.evaluation, evaluation):
            logger.warning(_kept_evaluation(report.evaluation or {}, evaluation, folder))
            return False
        report = dataclasses.replace(report, evaluation=evaluation)
        report.save(folder)
        _save_pictures(report, folder, picture=False)
        card = folder / CARD_NAME
        text = card_with_evaluation(card.read_text(encoding="utf-8"), report) if card.is_file() else None
        if text is not None:
            write_text(card, text)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        logger.warning(f"The evaluation could not be added to {str(folder)!r}: {error}")
        return False
    logger.info(f"The evaluation was added to the report, the page and the card in {str(folder)!r}.")
    return True


def _says_more(saved: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
    """Return whether a saved evaluation has accuracy that a new one lacks, or was made on more images."""
    if saved is None:
        return False
    has_accuracy, gets_accuracy = (each.get("top1") is not None for each in (saved, new))
    if has_accuracy != gets_accuracy:
        return has_accuracy
    return saved.get("num_images", 0) > new.get("num_images", 0)


def _kept_evaluation(saved: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> str:
    count, fewer = (counted(each.get("num_images", 0), "image") for each in (saved, new))
    lacks = ", without accuracy" if saved.get("top1") is not None and new.get("top1") is None else ""
    return (
        f"{str(folder)!r} keeps the evaluation on {count} that it holds, since this one is on {fewer}{lacks}. To replace "
        f"it, remove `evaluation` from {REPORT_NAME} there first."
    )


def _save_pictures(report: CompressionReport, folder: Path, picture: bool) -> None:
    """Save the page, and the picture of the ranks if it is asked for."""
    savers: dict[str, Callable[[], Any]] = {HTML_NAME: lambda: report.save_html(folder)}
    if picture:
        savers[RANKS_NAME] = lambda: plot_ranks(report, folder / RANKS_NAME)
    for name, save in savers.items():
        try:
            save()
        except Exception as error:
            # Hours of work must not be lost because a picture could not be drawn.
            logger.warning(f"The checkpoint is saved without {name!r}, which could not be created: {error}")


def _save_card(model: PreTrainedModel, report: CompressionReport, folder: Path, name: str) -> None:
    """Write the model card of a checkpoint into its folder; `name` is how the card calls the model."""
    needs = needs_of(read_json(folder / "config.json"))
    model_card(model, report, needs, name).save(folder / CARD_NAME)


def check_repo_id(repo_id: str) -> None:
    """Check that a name can be that of a repository on the Hub.

    Raises:
        ValueError: if it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} cannot be the name of a repository on the Hub; give one such as user/name. A local folder is "
            "written by `save_pretrained` or --output."
        ) from error


def upload_arguments(kwargs: dict[str, Any], directory: str | Path) -> tuple[str | None, dict[str, Any]]:
    """Take what concerns an upload out of the arguments of `save_pretrained`.

    Args:
        kwargs: The arguments, from which those are removed.
        directory: The folder to save to.

    Returns:
        The repository, or None if there is to be no upload, and the other arguments of `push_compressed`.

    Raises:
        ValueError: if the repository cannot have this name.
    """
    wanted = kwargs.pop("push_to_hub", False)
    found = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
    repo_id = found.pop("repo_id", None) or resolved(directory).name
    if not wanted:
        return None, {}
    check_repo_id(repo_id)
    return repo_id, found


def push_compressed(
    model: PreTrainedModel,
    repo_id: str,
    image_processor: Any,
    report: CompressionReport | None,
    *,
    token: str | None = None,
    private: bool | None = None,
    tags: str | list[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Save to a temporary folder and upload it; see `MixRankCompressor.push_to_hub`."""
    check_repo_id(repo_id)
    commit: dict[str, Any] = {"commit_message": "Upload a model compressed with optimum-mixrank"}
    commit |= {name: kwargs.pop(name) for name in _COMMIT if name in kwargs}
    revision = commit.get("revision")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        written = save_compressed(model, directory, image_processor, report, name=repo_id, **kwargs)
        api = HfApi(token=token)
        try:
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
        except Exception as error:
            raise _explained_refusal(error, repo_id, token) from error
        if written is not None and repository.repo_id != repo_id:
            # The Hub has put the user's name in front, without which the repository cannot be opened.
            _save_card(model, written, directory, repository.repo_id)
        _add_tags(directory, [tags] if isinstance(tags, str) else list(tags or []))
        # As in Transformers; references of pull requests exist already.
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(repo_id=repository.repo_id, folder_path=directory, **commit)


def _add_tags(folder: Path, tags: list[str]) -> None:
    """Add tags to the model card in a folder; a model without a report has no card, and gets one that holds them."""
    if not tags:
        return
    path = folder / CARD_NAME
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data = cast("ModelCardData", card.data)
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    card.save(path)


def _explained_refusal(error: Exception, repo_id: str, token: str | bool | None) -> Exception:
    """Return the error of an upload that could not begin: one with a remedy, if the cause is known."""
    if reason := why_unreachable():
        return OSError(f"{repo_id!r} cannot be uploaded, since the Hub cannot be reached ({reason}).")
    if not token and get_token() is None:
        return OSError(
            f"{repo_id!r} cannot be uploaded without an access token; run `hf auth login`, or pass `token` (on the command "
            "line, --token)."
        )
    return error
