"""Every fenced Python and shell block of README and documentation is executed, page by page and in order."""

import importlib.util
import os
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from docs.blocks import PAGES, blocks_of
from docs.stand_ins import STARTS, lay_out
from optimum.commands.optimum_cli import main as optimum_cli
from transformers.utils import logging

from optimum_mixrank.allocation import ALLOCATORS
from optimum_mixrank.compensation import COMPENSATORS
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.runtime.registry import KINDS, MEASURES


NOT_EXECUTED = {
    ("README.md", "pip install optimum-mixrank"): "installs a release; .ci/wheel.sh installs the wheel",
    ("README.md", "git clone"): "downloads the repository; .ci/run clones it",
    (
        "README.md",
        "examples/quickstart.py",
    ): "creates an environment; tests/pipeline/test_compressor.py runs the script",
    ("README.md", "-m pytest -n 2"): "creates an environment and runs the tests; .ci/run executes it",
    ("CONTRIBUTING.md", "-m pytest -m real_model"): "needs a pretrained checkpoint and its images; .ci/full",
    ("CONTRIBUTING.md", "mkdocs build"): "installs into the environment; .ci/run executes it",
    ("install.md", "pip install optimum-mixrank"): "installs a release; .ci/wheel.sh installs the wheel",
    ("install.md", "pip install ."): "installs into the environment; .ci/run installs the same",
    ("checkpoints.md", "push_to_hub"): "needs the Hub and a token",
    (
        "multi_gpu.md",
        "-m optimum.commands.optimum_cli",
    ): "several processes; tests/distributed/test_cli.py runs the same",
    ("multi_gpu.md", "one_node.yaml"): "several processes; tests/distributed/test_imagenet_example.py runs the same",
    (
        "multi_gpu.md",
        "several_nodes.yaml",
    ): "several processes; tests/distributed/test_imagenet_example.py runs the same",
    ("multi_gpu.md", "ACCELERATE_USE_CPU"): "several processes; tests/distributed runs all of its programs so",
    (
        "choosing.md",
        "--target-latency 0.6",
    ): "what a tiny model can reach depends on the machine; tests/commands/test_benchmark.py runs the same",
    (
        "choosing.md",
        "--ratios 0.3 0.4 0.5",
    ): "the same",
    (
        "deployment.md",
        "optimum-cli export onnx",
    ): "needs optimum-onnx and Transformers 4.57; .ci/full runs the same",
}
"""Blocks by page and a text that occurs in no other block of it, with the reason."""

NEEDED_MODULES = {
    ("deployment.md", "--output deit-base-onnx"): ("onnx", "onnxscript", "onnxruntime"),
    ("deployment.md", "deit-base-onnx-2"): ("onnx", "onnxscript", "onnxruntime"),
    ("deployment.md", "import onnxruntime"): ("onnx", "onnxscript", "onnxruntime"),
    ("deployment.md", "--runtime openvino\n"): ("openvino",),
    ("deployment.md", "--output deit-base-int8"): ("onnx", "onnxscript", "onnxruntime"),
    ("deployment.md", "Int8WeightOnlyConfig"): ("torchao",),
    ("deployment.md", "flatten_tensor_state_dict"): ("torchao",),
    ("training.md", "get_peft_model(model"): ("peft",),
    ("training.md", "merge_and_unload()"): ("peft",),
    ("training.md", "canonical_names"): ("peft",),
}
"""Blocks that run if these are installed, as in .ci/run, which sets MIXRANK_TEST_ALL_BLOCKS."""


@pytest.fixture
def workplace(request, tmp_path, monkeypatch):
    """Change to a folder with the page's stand-ins; extensions that its blocks register are forgotten afterwards."""
    lay_out(tmp_path, request.param)
    monkeypatch.chdir(tmp_path)
    for registry in (METRICS, ALLOCATORS, COMPENSATORS, KINDS, MEASURES):
        # What is imported only now would be forgotten too.
        assert all(registry[name] for name in registry)
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # A page may make an Accelerator of another precision than earlier tests did.
    AcceleratorState._reset_state()
    yield request.param
    # `benchmark --threads` sets their number for the rest of the process.
    torch.set_num_threads(threads)
    AcceleratorState._reset_state()
    logging.enable_progress_bar()
    torch.compiler.reset()


@pytest.mark.parametrize("workplace", [page for page in PAGES if blocks_of(page)], indirect=True)
def test_blocks_run(workplace, monkeypatch):
    page, namespace = workplace, {"__name__": "__main__"}
    exec(STARTS.get(page, ""), namespace)
    executed = 0
    for block in blocks_of(page):
        if _listed(NOT_EXECUTED, block) or not _installed(block):
            continue
        if block.is_python:
            # Empty lines in front give tracebacks the line numbers of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(PAGES[page]), "exec"), namespace)
        else:
            for words in block.commands:
                _run(words, block, monkeypatch)
        executed += 1
    assert executed or all(_listed(NOT_EXECUTED, block) for block in blocks_of(page))


@pytest.mark.parametrize(("page", "text"), [*NOT_EXECUTED, *NEEDED_MODULES])
def test_listed_blocks_exist(page, text):
    assert sum(text in block.text for block in blocks_of(page)) == 1


def _run(words, block, monkeypatch):
    """Run a command of a shell block through the function that its entry point calls."""
    where = f"{block.page}, line {block.line}"
    assert words[0] == "optimum-cli", f"{where}: {words[0]} is not executed; list the block in NOT_EXECUTED"
    assert not set("|><&;$`") & set("".join(words)), f"{where}: only plain commands are executed"
    monkeypatch.setattr(sys, "argv", words)
    try:
        optimum_cli()
    except SystemExit as exit:
        assert not exit.code, f"{where}: {' '.join(words)} exits with {exit.code}"


def _listed(table, block):
    return next((value for (page, text), value in table.items() if page == block.page and text in block.text), None)


def _installed(block):
    missing = [name for name in _listed(NEEDED_MODULES, block) or () if importlib.util.find_spec(name) is None]
    assert not missing or "MIXRANK_TEST_ALL_BLOCKS" not in os.environ, f"{missing} are not installed"
    return not missing
