"""What people type, and what they are told."""

import io
import re
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from commands.calling import cli, process

from optimum_mixrank import __version__
from optimum_mixrank.commands.parsing import CommandParser, count, fraction, merged, pattern, printable


def compress(*arguments, code=2):
    return cli("compress", "--model", "m", "--output", "o", *arguments, code=code)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rato", "0.5"), "There is no option --rato; did you mean --ratio?"),
        (("--output-dir", "out"), "There is no option --output-dir; did you mean --output?"),
        (("--calibration-data=images",), "There is no option --calibration-data; did you mean --dataset?"),
        (("--xyzzy",), "There is no option --xyzzy.\n"),
        (("stray",), "'stray' does not belong to any option."),
        (("--ratio", "30"), "30 is not in (0, 1): did you mean 0.3?"),
        (("--ratio", "half"), "'half' is not a number; give a fraction, such as 0.6."),
        (("--recipe", "bset"), "'bset' is unknown; did you mean best?"),
        (("--rank-pattern", "query:64"), "'query:64' is neither NAME=NUMBER, such as query=64, nor a JSON object"),
        (("--ratio", "60%"), "'60%' is not a number: did you mean 0.6?"),
        (("--ratio", "0,5"), "'0,5' is not a number: did you mean 0.5?"),
        (("--epochs", "many"), "Argument --epochs: 'many' is not a whole number.\n"),
        (("--held-out-ratio", "few"), "Argument --held-out-ratio: 'few' is not a number.\n"),
        (("--save_directory", "out"), "There is no option --save_directory; did you mean --output?"),
        (("--num_samples=8",), "There is no option --num_samples; did you mean --num-samples?"),
        (("--Ratio", "0.5"), "There is no option --Ratio; did you mean --ratio?"),
        (("--force",), "There is no option --force; did you mean --overwrite?"),
        (("--no-res",), "There is no option --no-res; did you mean --no-resume?"),
        (("-d", "images"), "There is no option -d; did you mean --dataset?"),
        (("--recipe", "BEST"), "Argument --recipe: 'BEST' is unknown; did you mean best?"),
        (("--overwrite=yes",), "--overwrite takes no value; leave 'yes' out.\n"),
        (("--dataset",), "--dataset needs a value.\n"),
        (("--structures",), "--structures needs at least one value.\n"),
        (("--dataset", "-images"), "The value of --dataset begins with a dash; write --dataset=-images\n"),
        (
            ("--learning-rate", "-1e-3"),
            "The value of --learning-rate begins with a dash; write --learning-rate=-1e-3\n",
        ),
        (("--dataset", ""), "--dataset is empty: perhaps a variable of the shell is not set.\n"),
        (("--ratio=",), "--ratio is empty: perhaps a variable of the shell is not set.\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_answered_in_three_lines(arguments, message):
    error = compress(*arguments)
    assert message in error
    assert error.startswith("Error: ") and error.count("\n") == 3
    assert "\nUsage: optimum-cli mixrank compress --model MODEL --output OUTPUT [options]\n" in error
    assert error.endswith("All options: optimum-cli mixrank compress --help\n")


def test_a_misspelt_option_comes_before_a_missing_one():
    assert "did you mean --model?" in cli("compress", "--modl", "m", code=2)[1]
    assert "required: --output" in cli("compress", "--model", "m", code=2)[1]


def test_a_value_without_its_option_comes_before_a_missing_one():
    assert "'vit' does not belong to any option. Did you mean --model vit?" in cli("compress", "vit", code=2)[1]
    assert "There is no option -m; did you mean --model?" in cli("compress", "-m", "vit", code=2)[1]


def test_an_unset_token_is_none():
    error = compress("--token", "", "--revision=", "--config", "gone.yaml", code=1)
    assert "--config 'gone.yaml' is not a file" in error


def test_several_numbers_are_separated_by_spaces():
    error = cli("plan", "--model", "m", "--ratios", "0.3,0.5", code=2)[1]
    assert "Argument --ratios: '0.3,0.5' is not one value; separate several by spaces: 0.3 0.5\n" in error
    assert "\nUsage: optimum-cli mixrank plan --model MODEL [options]\n" in error


def test_a_plan_has_no_output():
    assert "There is no option --output" in cli("plan", "--model", "m", "--output", "out", code=2)[1]


def test_a_misspelt_command_is_recognised():
    assert "'cmpress' is unknown; did you mean compress?" in cli("cmpress", code=2)[1]


def test_budgets_of_a_plan_are_checked_at_once():
    assert "30 is not in (0, 1): did you mean 0.3?" in cli("plan", "--model", "m", "--ratios", 30, 50, code=2)[1]


def test_version():
    assert cli("--version")[0] == f"optimum-mixrank {__version__}\n"


def test_the_package_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "optimum_mixrank", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "Make Vision Transformers smaller" in result.stdout
    assert result.stdout.split("}")[0] == process("--help")[0].split("}")[0]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", ["compress", "plan", "evaluate", "benchmark", "inspect", "merge"])
def test_help_prints_on_every_terminal(command, encoding, monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", file)
    parser = CommandParser(prog="x", description="out … × ‖ ±")
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    file.flush()
    text = file.buffer.getvalue().decode(encoding)
    assert ("out … × ‖ ±" if encoding == "utf-8" else "out ...") in text and command


def test_characters_of_another_encoding_are_replaced_by_similar_ones():
    class Ascii:
        encoding = "ascii"

    assert printable("a × b … “c” ‖ é", Ascii) == 'a x b ... "c" || ?'
    assert printable("plain", Ascii) == "plain"
    assert printable("a × b", io.StringIO()) == "a × b"


def test_patterns():
    assert pattern("query=64") == {"query": 64} and pattern("a.b=0.5") == {"a.b": 0.5}
    assert pattern('{"query": 64, "key": 8}') == {"query": 64, "key": 8}
    assert merged([{"a": 1}, {"b": 2}, {"a": 3}]) == {"a": 1, "b": 2}
    for text in ("query", "=3", "query=", "query=many", "[1]", "{"):
        with pytest.raises(ArgumentTypeError, match="is neither NAME=NUMBER"):
            pattern(text)


def test_fractions():
    assert fraction("0.25") == 0.25
    for text in ("0", "1", "-3", "250", "nan", "inf"):
        with pytest.raises(ArgumentTypeError, match=re.escape(f"{text} is not in (0, 1); give a fraction")):
            fraction(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("22M", 22_000_000),
        ("22.05m", 22_050_000),
        ("1.2B", 1_200_000_000),
        ("680 k", 680_000),
        ("22_050_664", 22_050_664),
        ("22,050,664", 22_050_664),
        ("22e6", 22_000_000),
        ("0.5G", 500_000_000),
    ],
)
def test_counts(text, number):
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "M", "-3", "0", "22MB", "22,5M", "many", "1e999", "0.1"])
def test_text_that_is_not_a_count(text):
    with pytest.raises(ArgumentTypeError, match="is not a number of parameters; give one such as 22M"):
        count(text)
