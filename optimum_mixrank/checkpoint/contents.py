"""What a checkpoint holds, in a folder or on the Hub, by its small files and the headers of the large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .files import StoredTensor


@dataclass(frozen=True)
class Contents:
    """Of a checkpoint.

    Attributes:
        folder: Where its configuration and report are.
        tensors: What its weight files hold, by tensor name.
        num_bytes: Of its weight files.
    """

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
    """Look into a checkpoint.

    Args:
        checkpoint: Local folder, or Hub id, of which about 100 kB are fetched for every weight file.
        also: Names of small files to fetch beside `config.json`.
        revision: Branch, tag or commit on the Hub.
        token: Access token of the Hub.
        cache_dir: Where downloads are kept.

    Raises:
        FileNotFoundError: for a folder without `config.json` or weights.
        ValueError: if it is neither a folder nor on the Hub, access is restricted, or its weights are not in safetensors.
    """
    folder = Path(checkpoint).expanduser()
    if folder.exists():
        return _in_folder(folder)
    return _on_hub(checkpoint, also, revision, token, cache_dir)


def _in_folder(folder: Path) -> Contents:
    from .files import safetensors_bytes, stored_tensors

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no config.json; name the folder of a checkpoint.")
    return Contents(folder, stored_tensors(folder), safetensors_bytes(folder))


def _on_hub(
    repo_id: str, also: Sequence[str], revision: str | None, token: str | None, cache_dir: str | None
) -> Contents:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    from .files import StoredTensor

    api = HfApi(token=token)
    try:
        # By its commit, so that all that follows is of one state.
        commit = api.model_info(repo_id, revision=revision).sha
        folder = Path(
            api.snapshot_download(repo_id, revision=commit, cache_dir=cache_dir, allow_patterns=["config.json", *also])
        )
        metadata = api.get_safetensors_metadata(repo_id, revision=commit)
        files = api.get_paths_info(repo_id, list(metadata.files_metadata), revision=commit)
    except GatedRepoError as error:
        raise ValueError(
            f"Access to {repo_id!r} is restricted; ask for it on the page of the repository, and give --token."
        ) from error
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        where = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repo_id!r} is no folder here and was not found on the Hub{where}; name a folder or a Hub id, and give "
            "--token for a private repository."
        ) from error
    except NotASafetensorsRepoError as error:
        raise ValueError(f"{repo_id!r} holds no weights in safetensors.") from error
    except SafetensorsParsingError as error:
        raise ValueError(f"{repo_id!r} holds a damaged safetensors file: {_in_a_line(error)}") from error
    except Exception as error:
        # Which error a missing network gives depends on the release of huggingface_hub.
        raise ValueError(
            f"{repo_id!r} is no folder here, and the Hub could not be asked: {_in_a_line(error)}"
        ) from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{repo_id!r} on the Hub has no config.json; name the repository of a checkpoint.")
    tensors = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return Contents(folder, tensors, sum(file.size for file in files if hasattr(file, "size")))


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
