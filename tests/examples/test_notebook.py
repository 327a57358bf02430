"""The notebook runs from top to bottom without a network, and is committed with its outputs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"


def code_cells(path):
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, str(ROOT / ".ci" / "notebook.py"), str(tmp_path / "out.ipynb")]
    subprocess.run(command, check=True)
    # The same cells have outputs as in the committed notebook.
    shown = [[bool(cell["outputs"]) for cell in code_cells(path)] for path in (tmp_path / "out.ipynb", NOTEBOOK)]
    assert shown[0] == shown[1]


def test_is_committed_with_small_outputs_and_without_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 150_000
    counts = [cell["execution_count"] for cell in code_cells(NOTEBOOK)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(NOTEBOOK) for output in cell["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    texts = ["".join(output.get("text", "")) for output in outputs]
    assert not any(re.search(r"(^|[\s'\"])(/\w+/|[A-Z]:\\)", each) for each in texts)
