"""Options as people type them: what was probably meant, with the command's own usage, on any terminal."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from decimal import Decimal
from typing import Any


ALIASES = {
    "--calibration-data": "--dataset",
    "--calibration-dataset": "--dataset",
    "--data": "--dataset",
    "--images": "--dataset",
    "--model-id": "--model",
    "--model-name-or-path": "--model",
    "--nsamples": "--num-samples",
    "--out": "--output",
    "--output-dir": "--output",
    "--save-directory": "--output",
}
"""What neighbouring tools call these options."""

_INVALID = re.compile(r"invalid (int|float) value: ('.*')")
"""What argparse says of a number that it cannot read."""

_NUMBERS = {"int": "a whole number.", "float": "a number."}

_ASCII = str.maketrans(
    {"…": "...", "–": "-", "−": "-", "×": "x", "‖": "||", "±": "+-", "“": '"', "”": '"', "’": "'", "\u00a0": " "}
)


class CommandParser(ArgumentParser):
    """The parser of a command; `adopt` turns one that Optimum has made into one."""

    @classmethod
    def adopt(cls, parser: ArgumentParser) -> None:
        """Give a parser the methods of this class; Optimum makes the parsers of all commands itself."""
        parser.__class__ = cls

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown options here, where those of the command are known."""
        words = sys.argv[1:] if args is None else list(args)
        # Before a missing option is complained about, which was perhaps misspelt.
        unknown = [word for word in words if word.startswith("--") and not self._is_option(word.partition("=")[0])]
        if unknown and self._subparsers is None:
            self.error(self._unknown(unknown[0]))
        found, surplus = super().parse_known_args(args, namespace)
        if surplus:
            self.error(self._unknown(surplus[0]))
        return found, surplus

    def error(self, message: str) -> Any:
        """End the program with one sentence and the shortest form of the command."""
        text = _INVALID.sub(lambda match: f"{match[2]} is not {_NUMBERS[match[1]]}", message)
        text = text[:1].upper() + text[1:]
        self.exit(2, f"Error: {text}\nUsage: {short_usage(self)}\nAll options: {self.prog} --help\n")

    def _is_option(self, name: str) -> bool:
        known = [each for action in self._actions for each in action.option_strings]
        # argparse accepts unique beginnings of names.
        return name == "--" or any(each.startswith(name) for each in known)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            close = difflib.get_close_matches(str(value), map(str, action.choices), n=1)
            meant = f"did you mean {close[0]}?" if close else f"choose among {', '.join(map(str, action.choices))}."
            raise argparse.ArgumentError(action if action.option_strings else None, f"{value!r} is unknown; {meant}")

    def _unknown(self, argument: str) -> str:
        option = argument.partition("=")[0]
        if not option.startswith("-"):
            return f"{argument!r} does not belong to any option."
        known = [each for action in self._actions for each in action.option_strings]
        meant = ALIASES.get(option)
        close = [meant] if meant in known else difflib.get_close_matches(option, known, n=1, cutoff=0.7)
        return f"there is no option {option}{f'; did you mean {close[0]}?' if close else '.'}"

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse prints help and errors through this method.
        stream = sys.stderr if file is None else file
        super()._print_message(printable(message, stream), stream)


def short_usage(parser: ArgumentParser) -> str:
    """Return the shortest form of a command: its required options."""
    required = [f"{action.option_strings[0]} {_value(action)}" for action in parser._actions if action.required]
    return " ".join([parser.prog, *required, "[options]"])


def name_values(parser: ArgumentParser) -> None:
    """Give the values of options short names for `--help`, where `add_argument` has not named them."""
    for action in parser._actions:
        if action.metavar is None and action.nargs != 0 and action.option_strings:
            last_word = action.dest.rpartition("_")[2].upper()
            names = {int: "N", float: "N", count: "N", fraction: "RATIO"}
            action.metavar = names.get(action.type, "NAME" if action.nargs == "+" else last_word)


def printable(text: str, stream: Any) -> str:
    """Return a text with characters that the encoding of a stream lacks replaced by similar ones."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def fraction(text: str) -> float:
    """Return the number of an option that is a fraction, in (0, 1)."""
    try:
        value = float(text)
    except ValueError:
        # A percentage, or a decimal comma.
        number = _number(text.replace("%", "").replace(",", "."))
        share = None if number is None else number / 100 if "%" in text else number
        is_clear = share is not None and 0 < share < 1
        hint = f": did you mean {share:g}?" if is_clear else "; give a fraction, such as 0.6."
        raise argparse.ArgumentTypeError(f"{text!r} is not a number{hint}") from None
    if 0 < value < 1:
        return value
    meant = f": did you mean {value / 100:g}?" if 5 <= value < 100 else "; give a fraction, such as 0.6."
    raise argparse.ArgumentTypeError(f"{text} is not in (0, 1){meant}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+|[\d_]*\.?\d+(?:e\d{1,2})?)\s?([kmbg]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def count(text: str) -> int:
    """Return the number of an option that counts parameters: `22M`, `1.2B`, `22_050_664` or `22,050,664`."""
    found = _NUMBER.fullmatch(text.strip())
    value = (
        0 if found is None else round(Decimal(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2].lower()])
    )
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters; give one such as 22M or 22050664.")
    return value


def pattern(text: str) -> dict[str, Any]:
    """Return values by the name of a layer, from `NAME=NUMBER` or a JSON object."""
    name, equals, value = text.rpartition("=")
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else {name: json.loads(value)} if equals else None
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither NAME=NUMBER, such as query=64, nor a JSON object, such as '{{\"query\": 64}}'."
        )
    return found


def merged(patterns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of several patterns; the first one for a name wins, as in the configuration."""
    return {name: value for each in reversed(patterns) for name, value in each.items()}


def _value(action: argparse.Action) -> str:
    return str(action.metavar or (action.dest or "").upper())
