"""Execute the notebook from top to bottom, and write its outputs into it.

    python .ci/notebook.py

Needs the extra `notebook`.
"""

import copy
from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_hour.ipynb"


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel in its own folder; an error in a cell is an error here.

    Messages to stderr and times are left out, so that nothing of the machine remains.
    """
    notebook = copy.deepcopy(nbformat.read(path, as_version=4))
    kernel = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=kernel, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # Version and interpreter of whoever ran it.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
