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
    "--baseline": "--reference",
    "--calibration-data": "--dataset",
    "--calibration-dataset": "--dataset",
    "--data": "--dataset",
    "--force": "--overwrite",
    "--format": "--runtime",
    "--images": "--dataset",
    "--model-id": "--model",
    "--model-name-or-path": "--model",
    "--nsamples": "--num-samples",
    "--original": "--reference",
    "--out": "--output",
    "--output-dir": "--output",
    "--save-dir": "--output",
    "--save-directory": "--output",
    "-b": "--batch-size",
    "-d": "--dataset",
    "-f": "--overwrite",
    "-m": "--model",
    "-n": "--num-samples",
    "-o": "--output",
    "-q": "--quiet",
    "-r": "--ratio",
    "-v": "--verbose",
}
"""What neighbouring tools call these options."""

_MAY_BE_EMPTY = ("--cache-dir", "--revision", "--token")
"""Options whose empty value, as an unset variable of the shell gives it, is the same as none."""

_IN_PLAIN_WORDS = {
    r"argument (.*): expected one argument": r"\1 needs a value.",
    r"argument (.*): expected at least one argument": r"\1 needs at least one value.",
    r"argument (.*): ignored explicit argument (.*)": r"\1 takes no value; leave \2 out.",
}
"""What argparse says, and a sentence that says the same."""

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
        # An abbreviation would change its meaning with the next option that begins like it.
        parser.allow_abbrev = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown options here, where those of the command are known."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            self._check_words(words)
        required = [action for action in self._actions if action.required and action.option_strings]
        for action in required:
            action.required = False
        try:
            found, surplus = super().parse_known_args(args, namespace)
        finally:
            for action in required:
                action.required = True
        # Before a missing option is complained about, whose name was perhaps left out.
        missing = [action.option_strings[0] for action in required if getattr(found, action.dest, None) is None]
        if surplus:
            meant = f" Did you mean {missing[0]} {surplus[0]}?" if missing and not surplus[0].startswith("-") else ""
            self.error(f"{self._unknown(surplus[0])}{meant}")
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return found, surplus

    def _check_words(self, words: Sequence[str]) -> None:
        """Refuse unknown options, values that look like options, and empty ones."""
        taking = {name for action in self._actions if action.nargs != 0 for name in action.option_strings}
        for before, word in zip(["", *words], words, strict=False):
            name, equals, value = word.partition("=")
            if self._looks_like_an_option(word) and not self._is_option(name):
                if before in taking and not word.startswith("--"):
                    self.error(f"the value of {before} begins with a dash; write {before}={word}")
                self.error(self._unknown(word))
            option, is_empty = (before, True) if word == "" else (name, bool(equals) and not value)
            if is_empty and option in taking and option not in _MAY_BE_EMPTY:
                self.error(f"{option} is empty: perhaps a variable of the shell is not set.")

    def error(self, message: str) -> Any:
        """End the program with one sentence and the shortest form of the command."""
        text = _INVALID.sub(lambda match: f"{match[2]} is not {_NUMBERS[match[1]]}", message)
        for said, plain in _IN_PLAIN_WORDS.items():
            text = re.sub(f"^{said}$", plain, text)
        text = text[:1].upper() + text[1:]
        self.exit(2, f"Error: {text}\nUsage: {self.usage or short_usage(self)}\nAll options: {self.prog} --help\n")

    def _looks_like_an_option(self, word: str) -> bool:
        """Return whether argparse would take a word for an option: -1e3 too, but not -1; `--` ends them."""
        if not word.startswith("-") or word in ("-", "--") or " " in word:
            return False
        return self._negative_number_matcher.match(word) is None

    def _is_option(self, name: str) -> bool:
        return name == "--" or any(name in action.option_strings for action in self._actions)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            parts = arg_string.split(",")
            if action.nargs != "+" or len(parts) < 2 or not all(map(_is_number, parts)):
                raise
            listed = " ".join(map(str.strip, parts))
            raise argparse.ArgumentError(
                action, f"{arg_string!r} is not one value; separate several by spaces: {listed}"
            ) from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            close = difflib.get_close_matches(str(value).lower(), map(str, action.choices), n=1)
            meant = f"did you mean {close[0]}?" if close else f"choose among {', '.join(map(str, action.choices))}."
            raise argparse.ArgumentError(action if action.option_strings else None, f"{value!r} is unknown; {meant}")

    def _unknown(self, argument: str) -> str:
        option = argument.partition("=")[0]
        if not option.startswith("-"):
            return f"{argument!r} does not belong to any option."
        known = [each for action in self._actions for each in action.option_strings]
        spelt = option.replace("_", "-").lower()
        meant = ALIASES.get(spelt)
        longer = [each for each in known if each.startswith(spelt)]
        if meant in known:
            close = [meant]
        elif len(longer) == 1 and spelt.startswith("--"):
            close = longer
        else:
            close = difflib.get_close_matches(spelt, known, n=1, cutoff=0.7)
        return f"there is no option {option}{f'; did you mean {close[0]}?' if close else '.'}"

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse prints help and errors through this method.
        stream = sys.stderr if file is None else file
        super()._print_message(printable(message, stream), stream)


def _is_number(text: str) -> bool:
    return _number(text) is not None


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
