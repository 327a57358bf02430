"""Every benchmark finds what it imports from the package, and says what it is for."""

import runpy

import pytest
from shipped import ROOT


FOLDER = ROOT / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_a_benchmark_can_be_imported(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    assert runpy.run_path(str(FOLDER / f"{name}.py"), run_name="benchmark")["__doc__"]
