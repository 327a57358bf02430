"""The file that `optimum-cli` finds is a copy outside this package."""

import runpy
from pathlib import Path

import optimum_mixrank.commands
from optimum_mixrank.commands.mixrank import MixRankCommand


def test_it_works_as_a_copy_elsewhere(tmp_path):
    original = Path(optimum_mixrank.commands.__file__).parent / "register_mixrank.py"
    copy = tmp_path / original.name
    copy.write_bytes(original.read_bytes())
    assert runpy.run_path(str(copy))["REGISTER_COMMANDS"] == [MixRankCommand]
