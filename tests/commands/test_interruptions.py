"""`optimum-cli mixrank compress`, interrupted or killed and started again."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

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
    # Training takes long enough for a signal that comes late.
    return ["compress", *given, "--compensation", "sequential", "distillation"]


def saved_steps(folder):
    """Time of writing, by name, of every entry that layer-wise compensation has saved."""
    found = {}
    for path in folder.glob("step*.safetensors"):
        with suppress(FileNotFoundError):  # just replaced or removed
            found[path.name] = path.stat().st_mtime_ns
    return found


def interrupt(arguments, folder, number):
    """Send a signal as soon as the next part of compensation is saved; return exit code and stderr."""
    before = saved_steps(folder)
    program = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", program, "mixrank", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not saved_steps(folder).items() - before.items():
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(), process.stderr.read()


def test_the_same_command_continues(arguments, tmp_path, caplog):
    folder = tmp_path / "out.unfinished"
    for number in (signal.SIGINT, signal.SIGTERM):
        code, stderr = interrupt(arguments, folder, number)
        assert code == 130 and "Traceback" not in stderr
        assert f"Interrupted. What was finished is kept in {str(folder)!r}: the same command continues" in stderr
        assert [each.name for each in tmp_path.iterdir()] == ["out.unfinished"]
    _, stderr = cli(*arguments, "--ratio", 0.4, code=1)
    assert "compression_ratio was 0.5 and is 0.4" in stderr and "--no-resume" in stderr
    cli(*arguments)
    assert "Resuming the unfinished run" in caplog.text
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_starting_again(arguments, tmp_path, caplog):
    interrupt(arguments, tmp_path / "out.unfinished", signal.SIGINT)
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
