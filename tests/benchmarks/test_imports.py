"""Every benchmark finds what it imports from the package, says what it is for, and explains its options."""

import ast
import runpy
import sys

import pytest
from shipped import ROOT


FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_can_be_imported(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    assert runpy.run_path(str(FOLDER / f"{name}.py"), run_name="benchmark")["__doc__"]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "parse_args()" in (FOLDER / f"{name}.py").read_text()])
def test_the_help_of_a_benchmark_begins_with_what_it_is_for(name, monkeypatch, capsys):
    file = FOLDER / f"{name}.py"
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    purpose = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
    assert purpose in " ".join(capsys.readouterr().out.split())
