"""The script that compares methods, as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


HARNESS = Path(__file__).parents[2] / "benchmarks" / "methods.py"
SMALL = ("--kept", 0.5, "--num-samples", 64, "--test-split", "calibration")


def compare(output, *arguments, code=0):
    command = [sys.executable, str(HARNESS), "--output", str(output), *map(str, (*SMALL, *arguments))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_a_table_a_picture_and_every_row(tmp_path):
    output = tmp_path / "results"
    compare(output, "--methods", "second moment", "svd", "--seeds", 0, 1)
    record = json.loads(output.with_suffix(".json").read_text())
    rows = {(row["method"], row["seed"]): row for row in record["rows"]}
    assert set(rows) == {(method, seed) for method in ("svd", "second moment") for seed in (0, 1)}
    for seed in (0, 1):
        assert rows["second moment", seed]["kl"] < rows["svd", seed]["kl"]
    for row in rows.values():
        assert 0.49 < row["kept"] <= 0.5
        assert row["top1"] == pytest.approx(row["correct"].count("1") / len(row["correct"]))
        assert row["change"][0] == pytest.approx(row["top1"] - record["original_top1"], abs=1e-6)
    assert (rows["svd", 0]["kl"], rows["svd", 0]["top1"]) == (rows["svd", 1]["kl"], rows["svd", 1]["top1"])
    assert record["settings"]["calibration_data"] == "data, calibration"
    table = output.with_suffix(".md").read_text()
    assert table.count("| svd | 50.0 % |") == table.count("| second moment | 50.0 % |") == 1
    assert table.index("| svd |") < table.index("| second moment |"), (
        "methods are listed in their own order, not in that of the work"
    )
    assert output.with_suffix(".png").stat().st_size > 10_000

    # Existing rows are not measured again; other settings need another file.
    before = [json.dumps(row) for row in record["rows"]]
    compare(output, "--methods", "svd", "second moment", "fast", "--seeds", 0, 1)
    after = [json.dumps(row) for row in json.loads(output.with_suffix(".json").read_text())["rows"]]
    assert after[: len(before)] == before and len(after) == len(before) + 2
    refused = compare(output, "--methods", "svd", "--batch-size", 32, code=1)
    assert "give another --output" in refused.stderr
