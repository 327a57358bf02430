"""The examples run at a small size, as a reader would call them."""

import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForImageClassification

from optimum_mixrank import FactoredLinear


EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(example, *arguments, code=0):
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def figures(text, row):
    """Return the numbers of a row in the table that an example prints."""
    line = next(line for line in text.splitlines() if line.startswith(row))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


SMALL = ("--num-samples", 256, "--test-samples", 400)


@pytest.mark.slow
def test_recover_accuracy_without_labels(tmp_path):
    text = run("recover_accuracy.py", "--output", tmp_path / "out", "--epochs", 2, *SMALL)
    kl_before, kl = (figures(text, row)[-1] for row in ("compressed", "trained"))
    assert kl < kl_before
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert any(isinstance(module, FactoredLinear) for module in model.modules())
    # The result is a checkpoint that can be trained further, now with labels and all options that save memory.
    again = run(
        *("recover_accuracy.py", "--model", tmp_path / "out", "--output", tmp_path / "again", "--epochs", 0.5, *SMALL),
        *("--label-weight", 0.5, "--bf16", "--gradient-checkpointing"),
    )
    assert figures(again, "compressed") == figures(text, "trained")
    assert figures(again, "trained")[0] > 60


@pytest.mark.slow
def test_lora(tmp_path):
    pytest.importorskip("peft")
    text = run("lora.py", "--output", tmp_path, "--epochs", 2, *SMALL)
    (before,), (adapted,), (merged,) = (figures(text, row) for row in ("top-1 before", "with adapter", "merged"))
    assert merged == pytest.approx(adapted, abs=0.5) and merged > before - 1
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("compressed", "merged")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    # Other classes: a new head on the same factors.
    data = datasets.load_dataset(str(EXAMPLES / "fashion_mnist" / "data"), split="calibration").select(range(200))
    labels = datasets.ClassLabel(names=["shoes", "other"])
    data = data.map(lambda row: {"label": int(row["label"] not in (5, 7, 9))}).cast_column("label", labels)
    data.train_test_split(50, seed=0).save_to_disk(tmp_path / "shoes")
    text = run(
        *(
            "lora.py",
            "--model",
            tmp_path / "compressed",
            "--data",
            tmp_path / "shoes",
            "--output",
            tmp_path / "shoes-out",
        ),
        *("--epochs", 5, "--target-modules", "all-linear"),
    )
    assert figures(text, "merged")[0] > 85
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "shoes-out" / "merged").num_labels == 2


@pytest.mark.slow
def test_int8(tmp_path):
    for package in ("torchao", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    text = run("int8.py", "--output", tmp_path, "--num-samples", 400)
    # top-1, agreement and KL; bytes are integers.
    full, *others = (figures(text, row) for row in ("compressed ", "torchao int8", "onnx ", "onnx int8"))
    assert all(abs(row[0] - full[0]) < 2 and row[2] < full[2] + 0.01 for row in others)
    assert (tmp_path / "torchao-int8.safetensors").stat().st_size < 450_000
    assert (tmp_path / "onnx-int8" / "model.onnx").stat().st_size < 600_000
    assert b"stack_trace" not in (tmp_path / "model.onnx").read_bytes()


@pytest.mark.slow
def test_feature_extraction(tmp_path):
    text = run("feature_extraction.py", "--output", tmp_path / "out", "--num-samples", 300)
    (original,), (compressed,) = (figures(text, row) for row in ("original", "compressed"))
    assert original > 60 and abs(original - compressed) < 5
    mean, least = figures(text, "cosine")
    assert 0.9 < least < mean < 1
    # Three answers of the pipeline, the best first.
    shares = [float(line.split()[-1].rstrip("%")) for line in text.splitlines()[-3:]]
    assert shares == sorted(shares, reverse=True) and 0 < shares[0] <= 100


def test_labels_that_are_missing_are_named(tmp_path):
    images = datasets.load_dataset(str(EXAMPLES / "fashion_mnist" / "data"), split="test").remove_columns("label")
    images.select(range(32)).to_parquet(tmp_path / "images.parquet")
    stderr = run(
        *(
            "recover_accuracy.py",
            "--data",
            tmp_path / "images.parquet",
            "--label-weight",
            1,
            "--output",
            tmp_path / "o",
        ),
        code=1,
    )
    assert "Labels are needed, and the data has none: image" in stderr.splitlines()[-1]
