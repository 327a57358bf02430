"""Opening a compressed checkpoint costs no more imports than opening a dense one, besides `checkpoint` and `runtime`."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


GOLDEN = Path(__file__).parent / "golden"
LOAD = """
import json, sys
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
print(json.dumps([type(model).__name__, sorted(sys.modules)]))
"""


@cache
def modules_after_loading(name, plugin=True):
    """Names of all modules of a fresh process that has loaded a checkpoint, with or without the plugin."""
    code = f"import optimum_mixrank\n{LOAD}" if plugin else LOAD
    result = subprocess.run([sys.executable, "-c", code, str(GOLDEN / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    class_name, modules = json.loads(result.stdout.splitlines()[-1])
    assert class_name.endswith("ForImageClassification")
    return modules


def packages(modules):
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("name", ["vit/factors", "swin/pivoted"])
def test_only_the_rooms_of_loading_are_imported(name):
    own = [module.split(".") for module in modules_after_loading(name) if module.split(".")[0] == "optimum_mixrank"]
    assert {parts[1] for parts in own if len(parts) > 1} == {"checkpoint", "runtime"}
    assert ["optimum_mixrank", "checkpoint", "modeling"] in own


@pytest.mark.parametrize(("name", "dense"), [("vit/factors", "vit/original"), ("swin/pivoted", "swin/original")])
def test_no_package_is_imported_that_a_dense_checkpoint_does_without(name, dense):
    compressed = packages(modules_after_loading(name))
    assert compressed - packages(modules_after_loading(dense, plugin=False)) <= {"optimum_mixrank"}
    assert not compressed & {"datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "aiohttp"}


@pytest.mark.parametrize("name", ["vit/factors", "swin/pivoted", "mixed/vit/factors", "mixed/swin/pivoted"])
@pytest.mark.parametrize("loader", ["AutoModelForImageClassification", "AutoModel"])
def test_without_the_plugin_loading_fails(name, loader):
    code = LOAD.replace("AutoModelForImageClassification", loader)
    result = subprocess.run([sys.executable, "-c", code, str(GOLDEN / name)], capture_output=True, text=True)
    assert result.returncode != 0 and "size" in result.stderr and "mismatch" in result.stderr
