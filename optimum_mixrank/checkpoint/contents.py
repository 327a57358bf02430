"""Inspect a checkpoint, in a folder or on the Hub, from its small files and the headers of its weight files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, errors, snapshot_download

from ..runtime.access import why_unreachable
from ..runtime.files import similar_paths
from ..runtime.formatting import shorten
from .architecture import check_exists
from .files import StoredTensor, safetensors_bytes, stored_tensors


_ANSWERS = (
    errors.HfHubHTTPError,
    errors.HFValidationError,
    errors.NotASafetensorsRepoError,
    errors.SafetensorsParsingError,
)
"""What the Hub has answered, or would answer with any connection."""


class Contents(NamedTuple):
    """The local folder of a checkpoint's small files, its tensors by name, and the size of its weight files."""

    folder: Path
    tensors: dict[str, StoredTensor]
    num_bytes: int


def contents_of(
    checkpoint: str,
    also: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Contents:
    """Return what a checkpoint holds, without loading its weights.

    Args:
        checkpoint: Local folder, or Hub id, from which about 100 kB are fetched for every weight file; without a
            connection, one that is in the cache.
        also: Names of small files to fetch besides `config.json`.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        cache_dir: Where downloads are kept.

    Raises:
        FileNotFoundError: if there is no `config.json`, or a folder holds no weights.
        ValueError: if it is neither a folder nor on the Hub, access is restricted, or its weights are not in safetensors.
    """
    check_exists(checkpoint)
    folder = Path(checkpoint).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no config.json; name the folder of a checkpoint.")
        return Contents(folder, stored_tensors(folder), safetensors_bytes(folder))
    api, patterns = HfApi(token=token), ["config.json", *also]
    try:
        # All that follows is asked for by commit, so that it belongs together.
        commit = api.model_info(checkpoint, revision=revision).sha
        folder = Path(api.snapshot_download(checkpoint, revision=commit, cache_dir=cache_dir, allow_patterns=patterns))
        metadata = api.get_safetensors_metadata(checkpoint, revision=commit)
        files = api.get_paths_info(checkpoint, list(metadata.files_metadata), revision=commit)
    except Exception as error:
        cached = None if isinstance(error, _ANSWERS) else _cached_folder(checkpoint, revision, cache_dir)
        if cached is None:
            raise ValueError(f"{checkpoint!r} {_explain(error, revision)}{_near(checkpoint)}") from error
        return Contents(cached, stored_tensors(cached), safetensors_bytes(cached))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint!r} on the Hub has no config.json; name the repository of a checkpoint.")
    tensors = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return Contents(folder, tensors, sum(file.size for file in files if hasattr(file, "size")))


def _cached_folder(checkpoint: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """Return the folder of a checkpoint in the cache, with its weights, if there is no connection to the Hub."""
    if not why_unreachable():
        return None
    with suppress(OSError):
        folder = Path(snapshot_download(checkpoint, revision=revision, cache_dir=cache_dir, local_files_only=True))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    return None


def _near(checkpoint: str) -> str:
    found = similar_paths(checkpoint, folders_only=True)
    return f" {found[:1].upper()}{found[1:]}" if found else ""


def _explain(error: Exception, revision: str | None) -> str:
    reason = shorten(" ".join(str(error).split()) or type(error).__name__, 400)
    if isinstance(error, errors.GatedRepoError):
        return "is restricted; ask for access on its page on the Hub, and give --token."
    if isinstance(error, errors.NotASafetensorsRepoError):
        return "holds no weights in safetensors."
    if isinstance(error, errors.SafetensorsParsingError):
        return f"holds a damaged safetensors file: {reason}"
    if isinstance(error, errors.HFValidationError | errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        where = f" at revision {revision!r}" if revision else ""
        remedy = "name a folder or a Hub id, and give --token for a private repository."
        return f"is not a local folder and was not found on the Hub{where}; {remedy}"
    # Which error a missing network gives depends on the release of huggingface_hub.
    return f"is not a local folder, and the Hub could not be asked: {reason}"
