"""`optimum-cli mixrank` in several processes, as documented."""

import json

import pytest
from commands.calling import cli
from distributed.launching import launch
from shipped import MODEL, write_few_images
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor


def cli_in_two(*arguments, environment, code=0):
    result = launch(2, "-m", "optimum.commands.optimum_cli", "mixrank", *arguments, environment=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_few_images(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def compressed(few, tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("cli")
    options = ("compress", "--model", MODEL, "--dataset", few, "--split", "calibration", "--ratio", 0.5, "--json")
    options += ("--evaluate-on", few, "--evaluate-split", "test", "--output")
    # A single document: only the main process prints.
    alone = json.loads(cli(*options, folder / "1")[0])
    return folder, alone, json.loads(cli_in_two(*options, folder / "2", environment=environment)[0])


def test_compress(compressed, few):
    folder, alone, together = compressed
    assert [layer["rank"] for layer in together["layers"]] == [layer["rank"] for layer in alone["layers"]]
    for name, value in alone["evaluation"].items():
        is_number = isinstance(value, float | int)
        assert together["evaluation"][name] == (pytest.approx(value, rel=1e-4) if is_number else value)
    assert together["environment"]["processes"] == 2
    files = {file.name: file.stat().st_size for file in (folder / "2").iterdir()}
    assert set(files) == {file.name for file in (folder / "1").iterdir()}
    assert (
        MixRankCompressor.from_pretrained(MODEL)
        .evaluate(AutoModelForImageClassification.from_pretrained(folder / "2"), few, split="test", num_samples=100)
        .agreement
        > 0.9
    )


def test_plan_writes_statistics_once_and_reuses_them(few, environment, tmp_path):
    path = tmp_path / "statistics.safetensors"
    options = ("plan", "--model", MODEL, "--ratios", 0.5, "--json", "--statistics", path)
    first, _ = cli_in_two(*options, "--dataset", few, "--split", "calibration", environment=environment)
    again, _ = cli(*options)
    assert json.loads(first) == json.loads(again)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_error_is_one_sentence(few, environment, tmp_path):
    options = ("compress", "--model", MODEL, "--dataset", few, "--split", "test", "--output", tmp_path / "out")
    _, stderr = cli_in_two(*options, "--ratio", 0.99, environment=environment, code=1)
    assert stderr.count("Error: --ratio 0.99") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_without_shared_work_runs_once(compressed, monkeypatch, rank):
    # What a launcher sets; no process waits for the others.
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    stdout, _ = cli("inspect", compressed[0] / "2", "--json")
    assert json.loads(stdout)["stored_values"] > 0 if rank == 0 else not stdout
