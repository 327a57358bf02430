"""Checkpoints in a folder and on a stand-in for the Hub."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from models import compressed, tiny_vit

from optimum_mixrank.checkpoint import contents
from optimum_mixrank.checkpoint.contents import contents_of
from optimum_mixrank.checkpoint.files import stored_tensors


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    compressed(tiny_vit(), "pivoted").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@dataclass
class StandIn:
    """Answers as the Hub does for a repository that holds the files of a folder."""

    repository: Path
    cache: Path
    token: str | None = None

    def model_info(self, repo_id, revision):
        if repo_id != "someone/vit":
            raise HFValidationError(repo_id)
        return SimpleNamespace(sha=f"commit of {revision}")

    def snapshot_download(self, repo_id, revision, cache_dir, allow_patterns):
        assert revision == "commit of main"
        self.cache.mkdir(exist_ok=True)
        for name in allow_patterns:
            if (self.repository / name).is_file():
                shutil.copy(self.repository / name, self.cache)
        return str(self.cache)

    def get_safetensors_metadata(self, repo_id, revision):
        assert revision == "commit of main"
        files = {}
        for file in self.repository.glob("*.safetensors"):
            alone = self.cache.parent / file.stem
            alone.mkdir()
            shutil.copy(file, alone / "model.safetensors")
            tensors = {
                name: TensorInfo(dtype=tensor.dtype, shape=list(tensor.shape), data_offsets=(0, 0))
                for name, tensor in stored_tensors(alone).items()
            }
            files[file.name] = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        if not files:
            raise NotASafetensorsRepoError
        return SimpleNamespace(files_metadata=files)

    def get_paths_info(self, repo_id, paths, revision):
        return [SimpleNamespace(size=(self.repository / path).stat().st_size) for path in paths]


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "HfApi", lambda token: StandIn(checkpoint, tmp_path / "cache", token))
    return checkpoint


def test_the_hub_shows_what_the_folder_shows(hub):
    (hub / "report.json").write_text("{}")
    local, remote = contents_of(str(hub)), contents_of("someone/vit", ["report.json", "missing.json"], revision="main")
    assert remote.tensors == local.tensors and remote.num_bytes == local.num_bytes
    assert (remote.folder / "config.json").read_bytes() == (hub / "config.json").read_bytes()
    assert sorted(path.name for path in remote.folder.iterdir()) == ["config.json", "report.json"]


def test_errors_name_the_repository_and_the_remedy(hub):
    with pytest.raises(ValueError, match="'someone/else' is not a local folder and was not found on the Hub.*--token"):
        contents_of("someone/else")
    (hub / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="'someone/vit' on the Hub has no config.json"):
        contents_of("someone/vit", revision="main")
    with pytest.raises(FileNotFoundError, match="has no config.json; name the folder"):
        contents_of(str(hub))


def test_other_formats_of_weights_are_refused(hub):
    for file in hub.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="'someone/vit' holds no weights in safetensors"):
        contents_of("someone/vit", revision="main")


ERRORS = {
    HFValidationError: "'someone/vit' is not a local folder and was not found on the Hub at revision 'v2'; .* --token",
    RepositoryNotFoundError: "'someone/vit' is not a local folder and was not found on the Hub at revision 'v2'",
    RevisionNotFoundError: "'someone/vit' is not a local folder and was not found on the Hub at revision 'v2'",
    GatedRepoError: "'someone/vit' is restricted; ask for access on its page",
    SafetensorsParsingError: "'someone/vit' holds a damaged safetensors file",
    # Raised without a network, or for a token without permission.
    RuntimeError: r"'someone/vit' is not a local folder, and the Hub could not be asked: \(Request ID: 1\) 403 Forbidden$",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_the_hub_become_one_sentence(kind, monkeypatch):
    class Failing:
        def model_info(self, *args, **kwargs):
            # The arguments of these classes differ between releases.
            error = kind.__new__(kind)
            error.args = ("(Request ID: 1)\n\n403 Forbidden",)
            raise error

    monkeypatch.setattr(contents, "HfApi", lambda token: Failing())
    with pytest.raises(ValueError, match=ERRORS[kind]):
        contents_of("someone/vit", revision="v2")


def test_token_and_cache_reach_the_hub(hub, tmp_path, monkeypatch):
    asked = []

    def api(token):
        asked.append(token)
        return StandIn(hub, tmp_path / "cache")

    download = StandIn.snapshot_download

    def watched(self, repo_id, revision, cache_dir, allow_patterns):
        asked.append(cache_dir)
        return download(self, repo_id, revision, cache_dir, allow_patterns)

    monkeypatch.setattr(contents, "HfApi", api)
    monkeypatch.setattr(StandIn, "snapshot_download", watched)
    contents_of("someone/vit", revision="main", token="secret", cache_dir="there")
    assert asked == ["secret", "there"]


def test_without_a_connection_the_cache_is_read(checkpoint, tmp_path, monkeypatch):
    class Unreachable:
        def model_info(self, *args, **kwargs):
            raise ConnectionError("no route")

    monkeypatch.setattr(contents, "HfApi", lambda token: Unreachable())
    monkeypatch.setattr(contents, "why_unreachable", lambda: "no network")
    cache = tmp_path / "cache" / "models--someone--vit"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    with pytest.raises(ValueError, match="the Hub could not be asked: no route"):
        contents_of("someone/vit", cache_dir=str(tmp_path / "cache"))
    shutil.copytree(checkpoint, cache / "snapshots" / "abc")
    found = contents_of("someone/vit", cache_dir=str(tmp_path / "cache"))
    assert found.tensors == stored_tensors(checkpoint) and found.num_bytes > 0
