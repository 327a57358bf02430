"""`optimum-cli mixrank` in several processes, as documented."""

import json
from pathlib import Path

import pytest
from distributed.launching import launch
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor


SHIPPED = Path(__file__).parent.parent.parent / "examples" / "fashion_mnist"
MODEL, DATA = str(SHIPPED / "model"), str(SHIPPED / "data")


def cli(count, *arguments, environment, code=0):
    result = launch(count, "-m", "optimum.commands.optimum_cli", "mixrank", *arguments, environment=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("cli")
    values = {}
    for count in (1, 2):
        stdout, _ = cli(
            count,
            *("compress", "--model", MODEL, "--dataset", DATA, "--split", "calibration", "--num-samples", 100),
            *("--ratio", 0.5, "--evaluate-on", DATA, "--evaluate-split", "test", "--json"),
            *("--output", folder / str(count)),
            environment=environment,
        )
        # A single document: only the main process prints.
        values[count] = json.loads(stdout)
    return folder, values


def test_compress(compressed):
    folder, values = compressed
    alone, together = values[1], values[2]
    assert [layer["rank"] for layer in together["layers"]] == [layer["rank"] for layer in alone["layers"]]
    for name, value in alone["evaluation"].items():
        assert together["evaluation"][name] == (value if value is None else pytest.approx(value, rel=1e-4))
    assert together["environment"]["processes"] == 2
    files = {file.name: file.stat().st_size for file in (folder / "2").iterdir()}
    assert set(files) == {file.name for file in (folder / "1").iterdir()}
    assert (
        MixRankCompressor.from_pretrained(MODEL)
        .evaluate(AutoModelForImageClassification.from_pretrained(folder / "2"), DATA, split="test", num_samples=100)
        .agreement
        > 0.9
    )


def test_plan_writes_statistics_once_and_reuses_them(compressed, environment, tmp_path):
    options = (
        "plan",
        "--model",
        MODEL,
        "--ratios",
        0.5,
        "--json",
        "--statistics",
        tmp_path / "statistics.safetensors",
    )
    first, _ = cli(2, *options, "--dataset", DATA, "--split", "test", "--num-samples", 40, environment=environment)
    again, _ = cli(1, *options, environment=environment)
    assert json.loads(first) == json.loads(again)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_an_error_is_one_sentence(environment, tmp_path):
    options = ("compress", "--model", MODEL, "--dataset", DATA, "--split", "test", "--output", tmp_path / "out")
    _, stderr = cli(2, *options, "--ratio", 0.99, environment=environment, code=1)
    assert stderr.count("Error: compression_ratio=0.99") == 1
    assert not (tmp_path / "out").exists()


def test_a_command_without_shared_work_runs_once(compressed, environment):
    stdout, _ = cli(2, "inspect", compressed[0] / "2", "--json", environment=environment)
    assert json.loads(stdout)["stored_values"] > 0
