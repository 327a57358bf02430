"""`benchmark --table`, and what the other commands make of the table."""

import json

import pytest
from allocation.tables import block_table
from commands.calling import cli
from models import compressed, segformer, tiny_vit

from optimum_mixrank.evaluation.latency_table import load_latency_table, save_latency_table


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_vit().save_pretrained(folder)
    return folder


def test_from_a_measured_table_to_a_compressed_checkpoint(dense, tmp_path):
    table = tmp_path / "latencies.json"
    measure = ("benchmark", "--model", dense, "--device", "cpu", "--threads", 1, "--repeats", 6, "--batch-size", 2)
    text, _ = cli(*measure, "--table", table)
    assert "Dense model" in text and "without its linear layers" in text and str(table) in text
    found = load_latency_table(table)
    assert found.conditions["batch_size"] == 2 and found.conditions["threads"] == 1
    # What is fast depends on the machine: the rest goes by a table that is known.
    save_latency_table(block_table(), table)
    method = ("--metric", "svd", "--compensation", "none", "--cost", "latency", "--latency-table", table)
    out = tmp_path / "out"
    result = json.loads(
        cli("compress", "--model", dense, *method, "--target-latency", 0.7, "--output", out, "--json")[0]
    )
    assert result["latency"]["predicted_share"] <= 0.7
    assert "Latency, predicted" in cli("inspect", out)[0]
    plan = json.loads(cli("plan", "--model", dense, *method, "--target-latency", 0.7, "--json")[0])
    assert [point["latency"] <= 0.7 for point in plan["points"]] == [True]
    plan = cli("plan", "--model", dense, *method, "--ratios", 0.2, 0.3)[0]
    assert "time" in plan.splitlines()[0]
    _, error = cli("compress", "--model", dense, *method, "--target-latency", 0.1, "--output", tmp_path / "no", code=1)
    assert "The smallest --target-latency that can be reached is" in error
    _, error = cli(
        "compress", "--model", dense, *method, "--ratio", 0.5, "--target-latency", 0.7, "--output", out, code=1
    )
    assert "Give only one of the two" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 1, 8), "--batch-size 1 8 names several sizes, but a table is for one"),
        (("--image-size", 64, 32, 16), "--image-size 64 32 16 is not a height and a width, or one number for both"),
        (("--reference", "other"), "--reference has no effect with --table"),
        (("--runtime", "fast"), "--runtime fast is unknown"),
        (("--compile", "--runtime", "eager"), "--compile contradicts --runtime eager"),
        (("--repeats", 5), "--repeats 5 is too few"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_tables_are_refused_before_work_starts(dense, tmp_path, arguments, message):
    table = tmp_path / "table.json"
    _, error = cli("benchmark", "--model", dense, "--table", table, "--device", "cpu", *arguments, code=1)
    assert message in error and not table.exists()


def test_the_device_is_checked_before_models_are_read(tmp_path):
    _, error = cli("benchmark", "--model", tmp_path / "nothing", "--device", "abacus", code=1)
    assert "--device abacus is unknown" in error


def test_a_model_that_names_no_size_is_measured_at_the_one_given(tmp_path):
    segformer().save_pretrained(tmp_path / "dense")
    arguments = ("benchmark", "--model", tmp_path / "dense", "--table", tmp_path / "table.json", "--device", "cpu")
    assert "pass --image-size" in cli(*arguments, code=1)[1]
    table = json.loads(cli(*arguments, "--repeats", 6, "--image-size", 32, 64, "--json")[0])
    assert table["conditions"]["image_shape"] == [3, 32, 64]
    assert max(layer["tokens"] for layer in table["layers"]) == 8 * 16


def test_what_cannot_be_measured(dense, tmp_path):
    out = tmp_path / "out"
    compressed(tiny_vit(), "pivoted").save_pretrained(out)
    _, error = cli("benchmark", "--model", out, "--table", tmp_path / "table.json", "--device", "cpu", code=1)
    assert "is compressed already" in error
    _, error = cli("benchmark", "--model", dense, "--reference", out, "--device", "cpu", code=1)
    assert f"--reference {str(out)!r} is compressed and --model {str(dense)!r} is not: swap the two." in error
    few = ("--repeats", 6, "--batch-size", 1, "--device", "cpu")
    text, _ = cli("benchmark", "--model", out, "--reference", out, *few, "--threads", 1)
    assert "model takes" in text and "time of reference" in text and "dense" not in text and ", 1 thread, " in text
    _, error = cli("benchmark", "--model", dense, "--runtime", "eager", code=1)
    assert "--runtime eager has no effect without --table" in error
