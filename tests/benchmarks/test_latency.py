"""The script that compares latencies, called as a user calls it but in this process."""

import json
import runpy
import sys

import pytest
from shipped import ROOT


SCRIPT = ROOT / "benchmarks" / "latency.py"


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_a_record_and_the_tables_made_from_it(latency, tmp_path, capsys):
    output = tmp_path / "latency"
    small = ("--shapes", "deit-s:32", "--blocks", 1, "--repeats", 6, "--batch-sizes", 1, 2, "--runtimes", "PyTorch")
    latency("--output", output, *small, "--structures", "pivoted", "width", "--profile")
    record = json.loads(output.with_suffix(".json").read_text())
    [case] = record["cases"]
    labels = ["dense", "pivoted, 40% kept", "width, 40% kept"]
    assert list(case["models"]) == labels
    assert case["models"]["dense"]["ideal"] == 1
    for label in labels[1:]:
        model = case["models"][label]
        assert 0.4 < model["ideal"] < 0.5
        assert model["weight_bytes"] < case["models"]["dense"]["weight_bytes"]
        assert model["activation_bytes"] <= case["models"]["dense"]["activation_bytes"]
        assert model["kept_bytes"] > 0
    assert [(run["batch_size"], run["model"]) for run in case["runs"]] == [
        (size, each) for size in (1, 2) for each in labels
    ]
    for run in case["runs"]:
        assert len(run["seconds"]) == 6
        assert run["quartiles"][0] <= run["median"] <= run["quartiles"][1]
        assert run["milliseconds"]["products"] > run["milliseconds"]["reordering"]
    table = output.with_suffix(".md").read_text()
    assert table.count("| pivoted, 40% kept | PyTorch | 1 |") == 1
    assert f"{record['settings']['threads']}" in table and record["environment"]["torch"] in table
    capsys.readouterr()
    latency("--render", output.with_suffix(".json"))
    assert capsys.readouterr().out == table


def test_what_has_to_be_given(latency, capsys):
    for arguments, message in (([], "--output is missing"), (["--output", "x", "--models", "a=b"], "needs --dense")):
        with pytest.raises(SystemExit):
            latency(*arguments)
        assert message in capsys.readouterr().err
