"""Execute the notebook from top to bottom, and write it with its outputs.

    python .ci/notebook.py [FILE]

writes it in its own place, or to FILE. Needs the extra `notebook`.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_hour.ipynb"


def executed() -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel in its own folder; an error in a cell is an error here."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Messages to stderr are about the machine rather than about the matter.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def smaller(png: str) -> str:
    """A picture in 64 colours: a fraction of the bytes, and it looks the same."""
    stream = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").reduce(2)
    picture.quantize(64).save(stream, format="png", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    nbformat.write(executed(), sys.argv[1] if len(sys.argv) > 1 else NOTEBOOK)
