"""The script for a GPU, tried without one: tiny models, every part in a process of its own."""

import argparse
import importlib
import json
import shutil
import sys

import pytest
import torch
from shipped import ROOT


FOLDER = ROOT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu")


def run(gpu, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    gpu.main()


def arguments(device):
    return argparse.Namespace(device=device, tiny=True)


def test_a_part_is_recorded_whatever_becomes_of_it(gpu, monkeypatch, tmp_path, capsys):
    output = tmp_path / "results" / "gpu"
    run(gpu, monkeypatch, "--device", "cpu", "--tiny", "--parts", "nccl", "--output", output)
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["parts"]["nccl"]["status"] == "done"
    assert record["parts"]["nccl"]["figures"] == {"skipped": "needs two CUDA devices"}
    assert record["environment"]["torch"] == torch.__version__ and record["settings"]["tiny"]
    late = gpu.measured(arguments("cpu"), "latency", 0.2, tmp_path)
    assert late["status"] == "ended after its time" and late["figures"] == {}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        failed = gpu.measured(arguments("cpu"), "reload", 60.0, tmp_path)
    assert failed["status"] == "failed" and failed["error"] == "exit code 1"
    run(gpu, monkeypatch, "--table", output.with_suffix(".json"))
    assert "| skipped | needs two CUDA devices |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so(gpu, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, "--output", tmp_path / "gpu")
    assert "--device cpu --tiny tries the script without one" in capsys.readouterr().err


def test_tables_show_errors_and_ratios(gpu):
    ratio = {"ratio": 0.5, "low": 0.4, "high": 0.6}
    figures = {
        "deit-s, ideal": {"factors": 0.45, "pivoted": 0.44},
        "deit-s, eager, bf16, batch 8": {"dense ms": 2.0, "factors": ratio, "pivoted": ratio},
        "deit-s, compiled, bf16, batch 8": {"error": "OutOfMemoryError: full"},
    }
    environment = {"device": "GPU", "torch": "2", "transformers": "5", "processor": "CPU", "cores": 2}
    parts = {
        "agreement": {"status": "failed", "error": "RuntimeError: no", "figures": {"deit-s, dense: logits": 1e-6}},
        "latency": {"status": "done", "figures": figures},
    }
    lines = gpu.lines_of({"settings": {"tiny": False}, "environment": environment, "seconds": 100, "parts": parts})
    assert "This part is not complete (failed: RuntimeError: no)." in lines
    assert "| deit-s, dense: logits | 1e-06 |" in lines
    assert "| deit-s | eager | bf16 | 8 | 2.00 ms | 0.50 (0.40 to 0.60) | 0.45 | 0.50 (0.40 to 0.60) | 0.44 |" in lines
    assert "| deit-s | compiled | bf16 | 8 | OutOfMemoryError: full |  |  |  |  |" in lines


@pytest.mark.slow
def test_every_part_runs(gpu, monkeypatch, tmp_path):
    output = tmp_path / "gpu"
    run(gpu, monkeypatch, "--device", "cpu", "--tiny", "--limit", 1800, "--output", output)
    parts = json.loads(output.with_suffix(".json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu.PARTS, "done")
    errors = [each for part in parts.values() for each in part["figures"].values() if isinstance(each, dict)]
    assert not [each["error"] for each in errors if "error" in each]
    assert all(value == 0 for value in parts["reload"]["figures"].values())
    assert all(value == 0 for name, value in parts["agreement"]["figures"].items() if "logits" in name)
