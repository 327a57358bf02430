"""`optimum-cli mixrank compress`, interrupted or killed and started again."""

import signal
import subprocess
import sys

import pytest
from commands.calling import cli
from shipped import DATA, MODEL, ROOT


@pytest.fixture
def arguments(tmp_path):
    options = {
        "--model": MODEL,
        "--dataset": DATA,
        "--split": "calibration",
        "--num-samples": 96,
        "--recipe": "fast",
        "--epochs": 2,
        "--save-interval": 0.01,
        "--output": tmp_path / "out",
    }
    given = [str(each) for pair in options.items() for each in pair]
    return ["compress", *given, "--compensation", "sequential", "distillation"]


# The process sends the signal to itself, since one from another process may come too late in a short run. What a shell
# starts in the background ignores Ctrl-C, and so do its children.
PROGRAM = """
import os, signal, sys
from optimum.commands.optimum_cli import main
from optimum_mixrank.runtime.journal import Journal

def save(journal, name, *arguments, **options):
    saved(journal, name, *arguments, **options)
    if journal.prefix.startswith("step"):
        os.kill(os.getpid(), number)

saved, Journal.save, number = Journal.save, save, int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def interrupt(arguments, number):
    """Run a command that gets a signal as soon as a part of compensation is saved; return exit code and stderr."""
    command = [sys.executable, "-c", PROGRAM, str(int(number)), "mixrank", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stderr


def test_the_same_command_continues(arguments, tmp_path, caplog):
    folder = tmp_path / "out.unfinished"
    for number in (signal.SIGINT, signal.SIGTERM):
        code, stderr = interrupt(arguments, number)
        assert code == 130 and "Traceback" not in stderr
        assert f"Interrupted. What was finished is kept in {str(folder)!r}: the same command continues" in stderr
        assert [each.name for each in tmp_path.iterdir()] == ["out.unfinished"]
    _, stderr = cli(*arguments, "--ratio", 0.4, code=1)
    assert "compression_ratio was 0.5 and is 0.4" in stderr and "--no-resume" in stderr
    cli(*arguments)
    assert "Resuming the unfinished run" in caplog.text
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_starting_again(arguments, tmp_path, caplog):
    assert interrupt(arguments, signal.SIGINT)[0] == 130
    cli(*arguments, "--ratio", 0.4, "--no-resume")
    assert "Resuming the unfinished run" not in caplog.text
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_at_random_moments():
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py"), "--fork", "--times", "3", "--seed", "1"]
    options = ["--num-samples", "32", "--compensation", "sequential"]
    result = subprocess.run([*script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 differ" in result.stdout
