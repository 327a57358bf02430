"""`optimum-cli mixrank …` in a process of its own, and, for a tenth of the time, in that of the tests."""

import contextlib
import io
import logging
import signal
import subprocess
import sys
from unittest import mock

import datasets
import torch
from optimum.commands.optimum_cli import main as optimum_cli
from transformers.utils import logging as transformers_logging


def process(*arguments, code=0):
    """Run the command as a program; return stdout and stderr."""
    program = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", program, "mixrank", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


def cli(*arguments, code=0):
    """Call what the program calls; return what it prints to stdout and stderr.

    Messages of the logger go to pytest, and an error that the command does not turn into a sentence is raised.
    """
    stdout, stderr, found = io.StringIO(), io.StringIO(), 0
    words = ["optimum-cli", "mixrank", *map(str, arguments)]
    with (
        _settings_kept(),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            optimum_cli()
        except SystemExit as end:
            found = end.code or 0
    assert found == code, stderr.getvalue()
    return stdout.getvalue(), stderr.getvalue()


@contextlib.contextmanager
def _settings_kept():
    """Undo what a command sets for the rest of its process."""
    root = logging.getLogger("optimum_mixrank")
    level, handler, threads = root.level, signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    libraries = [(library, library.get_verbosity()) for library in (transformers_logging, datasets.utils.logging)]
    bars, bars_of_datasets = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    try:
        yield
    finally:
        root.setLevel(level)
        signal.signal(signal.SIGTERM, handler)
        torch.set_num_threads(threads)
        for library, verbosity in libraries:
            library.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not bars_of_datasets:
            datasets.enable_progress_bars()
