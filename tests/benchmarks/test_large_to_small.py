"""A large model compressed to the size of a small one: the script on a few images, and its table in the documentation."""

import gzip
import json
import runpy
import sys

import numpy as np
import pytest
from shipped import ROOT


SCRIPT = ROOT / "benchmarks" / "large_to_small.py"
RECORD = ROOT / "benchmarks" / "results" / "large_to_small.json"


@pytest.fixture
def call(monkeypatch):
    for folder in (SCRIPT.parent, ROOT / "examples" / "fashion_mnist"):
        monkeypatch.syspath_prepend(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.fixture
def data(tmp_path):
    """The four files of Fashion-MNIST with random images, as many as the script divides into parts and a few more."""
    folder, generator = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for prefix, count in (("train", 4096), ("t10k", 40)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", images[:, 0, 0] % 10)):
            header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return folder


def test_rows_are_measured_once_and_compared(data, call, tmp_path):
    arguments = ("--data", data, "--models", tmp_path / "models", "--output", tmp_path / "out", "--blocks", 2)
    arguments += ("--train-images", 64, "--epochs", 1, "--batch-size", 32, "--calibration-images", 32)
    arguments += ("--compressed", "large, best", "--widths", 48, 32)
    call(*arguments, "--seeds", 0)
    record = json.loads((tmp_path / "out.json").read_text())
    rows = {row["model"]: row for row in record["rows"]}
    small, large = rows["small, trained"]["parameters"], rows["large, trained"]["parameters"]
    assert 0.98 * small < rows["large, best"]["parameters"] <= small < large
    assert all(row["top1"] == pytest.approx(row["correct"].count("1") / 40) for row in record["rows"])

    call(*arguments, "--seeds", 0, 1)
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["rows"][:3] == record["rows"] and len(again["rows"]) == 6
    text = (tmp_path / "out.md").read_text()
    assert "2 seeds" in text and text.count("| large, best |") == 2 and "±" in text
    with pytest.raises(SystemExit, match="give another --output"):
        call(*arguments, "--epochs", 2)


def test_the_page_shows_what_the_record_says(call, capsys, tmp_path):
    page = ROOT / "docs" / "results.md"
    call("--render", RECORD)
    assert capsys.readouterr().out.strip() in page.read_text(), f"run {SCRIPT.name} --render {RECORD} --page {page}"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    call("--render", RECORD, "--page", copy)
    assert copy.read_text() == page.read_text()
