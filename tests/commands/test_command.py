"""How commands print errors."""

import re
from argparse import ArgumentParser

import pytest

from optimum_mixrank.commands.command import MixRankSubcommand


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"Error: There is not enough memory \(MemoryError\)\. Use a smaller --batch-size"),
        (RuntimeError(), "Error: RuntimeError without a message; --debug shows"),
        (KeyError("name"), "Error: KeyError: 'name'"),
        (ValueError("a value"), "Error: a value$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_no_error_is_empty(error, message, capsys):
    class Failing(MixRankSubcommand):
        description = "Fails."

        @classmethod
        def add_arguments(cls, parser):
            pass

        def execute(self):
            raise error

    parser = ArgumentParser()
    command = Failing.__new__(Failing)
    command.parse_args(parser)
    command.args = parser.parse_args([])
    with pytest.raises(SystemExit, match="1"):
        command.run()
    assert re.match(message, capsys.readouterr().err.strip())
