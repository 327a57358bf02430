"""Start programs in several processes on this machine, as `accelerate launch` does."""

import json
import subprocess
import sys
from pathlib import Path


WORKER = Path(__file__).parent / "worker.py"
COUNTS = (1, 2, 3)


def launcher(count):
    """Return the command that starts a Python program in `count` processes; without a GPU they use gloo."""
    if count == 1:
        return [sys.executable]
    settings = {"num_processes": count, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options = [f"--{name}={value}" for name, value in {**settings, "main_process_port": 0}.items()]
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options]


def launch(count, *arguments, environment):
    """Run a program in `count` processes, and wait until all have ended."""
    command = [*launcher(count), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def run_cases(cases, count, folder, environment):
    """Return the results of all cases in every process, in the order of the processes."""
    folder.mkdir()
    result = launch(count, WORKER, cases, folder, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(count)]
