"""Messages follow Transformers' verbosity, and go to the program's own handlers if it has some."""

import logging
import subprocess
import sys

import pytest
from transformers.utils import logging as transformers_logging

from optimum_mixrank.runtime.logging import get_logger


ROOT = logging.getLogger("optimum_mixrank")


@pytest.fixture(autouse=True)
def levels():
    before = transformers_logging.get_verbosity(), ROOT.level
    # A command that ran earlier in this process may have set it.
    ROOT.setLevel(logging.NOTSET)
    get_logger("optimum_mixrank.tests")
    yield
    transformers_logging.set_verbosity(before[0])
    ROOT.setLevel(before[1])


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (logging.ERROR, ["error"]),
        (logging.WARNING, ["warning", "error"]),
        (logging.INFO, ["info", "warning", "error"]),
        (logging.DEBUG, ["debug", "info", "warning", "error"]),
    ],
)
def test_transformers_verbosity_applies(verbosity, expected, caplog):
    transformers_logging.set_verbosity(verbosity)
    logger = get_logger("optimum_mixrank.somewhere.deep")
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)(level)
    assert caplog.messages == expected


def test_a_level_of_the_package_takes_precedence(caplog):
    transformers_logging.set_verbosity_error()
    ROOT.setLevel(logging.INFO)
    get_logger("optimum_mixrank.somewhere").info("logged")
    ROOT.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_debug()
    get_logger("optimum_mixrank.somewhere").warning("suppressed")
    assert caplog.messages == ["logged"]


PROGRAM = """
import logging, sys, transformers
if sys.argv[1] == "handlers":
    logging.basicConfig(format="program: %(message)s")
from optimum_mixrank.runtime.logging import get_logger
get_logger("optimum_mixrank.somewhere").info("too early")
transformers.logging.set_verbosity_info()
get_logger("optimum_mixrank.somewhere").info("logged")
"""


@pytest.mark.parametrize(("handlers", "expected"), [("no", "logged\n"), ("handlers", "program: logged\n")])
def test_logged_once_to_stderr_or_to_the_handlers_of_the_program(handlers, expected):
    command = [sys.executable, "-c", PROGRAM, handlers]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == expected and not result.stdout
