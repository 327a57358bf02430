"""The ImageNet example under `accelerate launch`, on a few images, with its configuration files."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from calibration.pictures import processor, write
from models import tiny_vit
from transformers import AutoModelForImageClassification

from optimum_mixrank import FactoredLinear


EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "imagenet"


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """Folders named differently from the classes of the model, two of which have the same name, as in ImageNet."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 4), ("val", 2)):
        for index in range(5):
            write(folder / "images" / split / f"n{index:08}", count)
    model = tiny_vit(id2label=dict(enumerate(["cock", "crane", "crate", "crane", "tench"])))
    model.save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    return folder


def start(configuration, *options, folder, out, environment):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLE / configuration)]
    arguments = ["--model", folder / "model", "--dataset", folder / "images", "--output", out, "--num-samples", 12]
    arguments += ["--recipe", "fast", "--ratio", 0.3, "--batch-size", 4, "--num-workers", 1]
    words = [*command, *map(str, options), str(EXAMPLE / "compress.py"), *map(str, arguments)]
    # Every run has its own cache, like every machine.
    caches = {"HF_DATASETS_CACHE": str(out.with_suffix(".cache"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env={**environment, **caches}, **pipes)


def check(process, expected_prints):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("top-1 accuracy") == expected_prints
    return stderr


def check_result(out):
    report = json.loads((out / "mixrank_report.json").read_text())
    assert report["environment"]["processes"] == 2 and report["evaluation"]["num_images"] == 10
    assert "top-1" in (out / "README.md").read_text().lower()
    model = AutoModelForImageClassification.from_pretrained(out)
    assert any(isinstance(module, FactoredLinear) for module in model.modules())


def test_one_node(laid_out, tmp_path, environment):
    out = tmp_path / "out"
    options = ("--num_processes", 2, "--main_process_port", 0)
    process = start("one_node.yaml", *options, folder=laid_out, out=out, environment=environment)
    stderr = check(process, 1)
    assert stderr.count("Calibrated: 12 images") == 1 and stderr.count("labels are matched by index") == 1
    check_result(out)


@pytest.mark.slow
def test_several_nodes(laid_out, tmp_path, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / "first", tmp_path / "second"]
    processes = [
        start(
            "several_nodes.yaml",
            *("--num_processes", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"),
            *("--main_process_port", port),
            folder=laid_out,
            out=outs[rank],
            environment=environment,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(processes):
        check(process, 1 - rank)
    check_result(outs[0])
    # Machines do not share their disks.
    assert not outs[1].exists()
