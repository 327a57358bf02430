"""`optimum-cli mixrank compress`, interrupted or killed and started again."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "examples" / "fashion_mnist"


@pytest.fixture
def command(tmp_path):
    program = "from optimum.commands.optimum_cli import main; main()"
    options = {
        "--model": SHIPPED / "model",
        "--dataset": SHIPPED / "data",
        "--split": "calibration",
        "--num-samples": 256,
        "--recipe": "fast",
        "--compensation": "sequential",
        "--save-interval": 0.01,
        "--output": tmp_path / "out",
    }
    arguments = [str(each) for pair in options.items() for each in pair]
    return [sys.executable, "-c", program, "mixrank", "compress", *arguments]


def saved_steps(folder):
    """Time of writing, by name, of every entry that layer-wise compensation has saved."""
    found = {}
    for path in folder.glob("step*.safetensors"):
        with suppress(FileNotFoundError):  # just replaced or removed
            found[path.name] = path.stat().st_mtime_ns
    return found


def interrupt(command, folder, number):
    """Send a signal as soon as the next part of compensation is saved; return exit code and stderr."""
    before = saved_steps(folder)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not saved_steps(folder).items() - before.items():
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(), process.stderr.read()


def test_the_same_command_continues(command, tmp_path):
    folder = tmp_path / "out.unfinished"
    for number in (signal.SIGINT, signal.SIGTERM):
        code, stderr = interrupt(command, folder, number)
        assert code == 130 and "Traceback" not in stderr
        assert f"Interrupted. What was finished is kept in {str(folder)!r}: the same command continues" in stderr
        assert [each.name for each in tmp_path.iterdir()] == ["out.unfinished"]
    other = subprocess.run([*command, "--ratio", "0.4"], capture_output=True, text=True)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "compression_ratio was 0.5 and is 0.4" in other.stderr and "--no-resume" in other.stderr
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0 and "Resuming the unfinished run" in finished.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_start_anew(command, tmp_path):
    interrupt(command, tmp_path / "out.unfinished", signal.SIGINT)
    anew = subprocess.run([*command, "--ratio", "0.4", "--no-resume"], capture_output=True, text=True)
    assert anew.returncode == 0 and "Going on" not in anew.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_killed_at_random_moments():
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py"), "--fork", "--times", "3", "--seed", "1"]
    options = ["--num-samples", "32", "--compensation", "sequential"]
    result = subprocess.run([*script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 differ" in result.stdout
