"""The script that compares methods, called as a user calls it but in this process."""

import json
import runpy
import sys

import pytest
from shipped import ROOT, write_few_images


HARNESS = ROOT / "benchmarks" / "methods.py"
RECORDS = ROOT / "benchmarks" / "results"


@pytest.fixture
def compare(tmp_path, monkeypatch):
    data = str(write_few_images(tmp_path / "data"))
    small = ("--kept", 0.5, "--num-samples", 64, "--calibration-data", data, "--test-data", data)
    monkeypatch.syspath_prepend(HARNESS.parent)

    def run(output, *arguments):
        monkeypatch.setattr(sys, "argv", [HARNESS.name, "--output", str(output), *map(str, (*small, *arguments))])
        runpy.run_path(str(HARNESS), run_name="__main__")

    return run


def test_a_table_a_picture_and_every_row(compare, tmp_path):
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
    with pytest.raises(SystemExit, match="give another --output"):
        compare(output, "--methods", "svd", "--batch-size", 32)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in RECORDS.glob("*.json") if '"change"' in path.read_text())
)
def test_intervals_and_tables_follow_from_the_outcomes_that_are_kept(name, monkeypatch):
    monkeypatch.syspath_prepend(HARNESS.parent)
    path = RECORDS / f"{name}.json"
    script, record = runpy.run_path(str(HARNESS)), json.loads(path.read_text())
    original = record["original_correct"]
    assert record["original_top1"] == pytest.approx(original.count("1") / len(original))
    for row in record["rows"]:
        assert row["change"] == pytest.approx(script["paired_change"](original, row["correct"])), row["method"]
    if (table := path.with_suffix(".md")).exists():
        assert table.read_text() == script["markdown"](record)


@pytest.mark.parametrize("name", ["fashion_mnist_methods", "vit_s_methods"])
def test_the_page_of_results_holds_the_whole_table(name):
    _, table = (RECORDS / f"{name}.md").read_text().split("\n\n")
    assert table in (ROOT / "docs" / "results.md").read_text()
