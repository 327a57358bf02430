"""Start programs in several processes on this machine, as `accelerate launch` does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).parent / "worker.py"
SEVERAL = (pytest.param(2, marks=pytest.mark.slow), 3)
COUNTS = (1, *SEVERAL)
MODULES = ("calibration_cases", "compression_cases", "resuming_cases", "training_cases", "error_cases")
"""In this order: after errors, the processes are in step, but the Accelerator has been made several times."""


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


class Results(dict):
    """By number of processes, the results of all cases in every process; each number is started once, when needed."""

    def __init__(self, folder, environment):
        super().__init__()
        self.folder, self.environment = folder, environment

    def __missing__(self, count):
        folder = self.folder / str(count)
        folder.mkdir()
        result = launch(count, WORKER, folder, *MODULES, environment=self.environment)
        assert result.returncode == 0, result.stdout + result.stderr
        self[count] = [json.loads((folder / f"{index}.json").read_text()) for index in range(count)]
        return self[count]


class ResultsOfModule(dict):
    """The part of `Results` that a module of cases has."""

    def __init__(self, results, module):
        super().__init__()
        self.results, self.module = results, module

    def __missing__(self, count):
        return [each[self.module] for each in self.results[count]]
