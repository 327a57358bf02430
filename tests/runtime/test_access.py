"""Without a network, a name on the Hub is answered quickly; with one, nothing changes."""

import socket

import datasets
import huggingface_hub
import pytest

from optimum_mixrank.calibration.images.sources import load_image_dataset
from optimum_mixrank.checkpoint.architecture import read_config
from optimum_mixrank.runtime import access
from optimum_mixrank.runtime.access import why_unreachable


@pytest.fixture
def requests(monkeypatch):
    """Let requests fail as they do without a network; the list holds the addresses that were asked for."""
    asked = []

    class Session:
        def head(self, url, **_):
            asked.append(url)
            try:
                raise socket.gaierror(-2, "Name or service not known")
            except OSError as error:
                raise RuntimeError("a class of some release of the client") from error

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(access, "_PAUSE_SECONDS", 0)
    return asked


def test_a_missing_network_is_noticed_after_two_requests(requests):
    assert why_unreachable() == "no network: Name or service not known"
    assert len(requests) == 2


def test_a_refused_or_silent_connection_counts_as_none():
    silent = type("ConnectTimeout", (Exception,), {})()
    assert access._missing_connection(silent) == "no network: the connection timed out"
    assert "refused" in access._missing_connection(ConnectionRefusedError(111, "Connection refused"))


@pytest.mark.parametrize("error", [ValueError("404"), TimeoutError("slow"), FileNotFoundError(2, "no such file")])
def test_other_errors_are_left_to_the_download(monkeypatch, error):
    class Session:
        def head(self, *_, **__):
            raise error

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    assert why_unreachable() == ""


def test_a_client_that_is_told_to_stay_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert why_unreachable() == "HF_HUB_OFFLINE is set"


@pytest.mark.usefixtures("requests")
def test_a_model_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit-small").mkdir()
    with pytest.raises(
        OSError, match="'vit-smal' is neither a local folder nor in the cache, .*no network: .*'vit-small'"
    ):
        read_config("vit-smal", {})
    with pytest.raises(OSError, match="name a folder with a config.json, or connect to the network"):
        read_config("me/other", {})


def test_a_model_in_the_cache_needs_no_network(requests, tmp_path):
    snapshot = tmp_path / "models--me--vit" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "models--me--vit" / "refs").mkdir()
    (tmp_path / "models--me--vit" / "refs" / "main").write_text("abc")
    assert read_config("me/vit", {"cache_dir": str(tmp_path)}).model_type == "vit"
    assert not requests


@pytest.mark.usefixtures("requests")
def test_a_dataset_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match="no folder 'picturs', nor .*no network: .* did you mean 'pictures'"):
        load_image_dataset("picturs")


@pytest.mark.usefixtures("requests")
def test_a_dataset_in_the_cache_needs_no_network(tmp_path):
    features = datasets.Features({"image": datasets.Image(decode=False)})
    folder = tmp_path / "me___birds" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    splits = {"train": {"name": "train", "num_examples": 1}}
    info = datasets.DatasetInfo(
        features=features, splits=splits, builder_name="parquet", dataset_name="birds", config_name="default"
    )
    info.write_to_directory(folder)
    with datasets.arrow_writer.ArrowWriter(features=features, path=str(folder / "birds-train.arrow")) as writer:
        writer.write({"image": {"path": "a.png", "bytes": None}})
        writer.finalize()
    assert len(load_image_dataset("me/birds", cache_dir=str(tmp_path))) == 1
    assert not datasets.config.HF_HUB_OFFLINE


def test_no_token_holds_too():
    with access.hub_reached_by({"token": "hf_secret", "cache_dir": "cache"}), access.hub_reached_by({"token": False}):
        assert access.hub_access() == {"token": False, "cache_dir": "cache"}
