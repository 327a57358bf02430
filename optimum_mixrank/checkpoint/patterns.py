"""Match the names of layers against the patterns of users and files, in bounded time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

import regex

from ..runtime.formatting import quote, shorten


MAX_LENGTH = 10_000
"""Characters of a pattern; more would take the parser long, and no name of a layer needs them."""

MAX_REPETITIONS = 10_000
"""Product of the least repetitions in a pattern, such as 6 for `(a{2}){3}`."""

SECONDS = 5.0
"""How long one pattern may be matched; sensible ones take milliseconds."""


def check_regex(field: str, pattern: str) -> None:
    """Check that a string is a regular expression.

    Raises:
        ValueError: if it is not, or too long; the message names the field.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{field} has a pattern of {len(pattern):,} characters; {MAX_LENGTH:,} are allowed.")
    if re.fullmatch(r"[\w.]*", pattern):
        return
    try:
        # Whatever is repeated so many times is compiled as many times.
        if math.prod(max(1, int(count)) for count in re.findall(r"\{(\d+)", pattern)) > MAX_REPETITIONS:
            raise OverflowError(f"it repeats more than {MAX_REPETITIONS:,} times")
        re.compile(pattern)
        regex.compile(pattern)
    # An error has many types: too deep a nesting, too large a number of repetitions.
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        reason = shorten(str(error) or type(error).__name__)
        raise ValueError(
            f"{field} has {quote(pattern)}, which is not a valid regular expression: {reason}."
        ) from error


def is_end(name: str, end: str) -> bool:
    """Return whether a name is `end`, or ends with it after a dot."""
    return name == end or name.endswith(f".{end}")


def matching(field: str, pattern: str, names: Iterable[str], ends: bool = False) -> set[str]:
    """Return the names that a regular expression matches as a whole or, with `ends`, from any of their parts on.

    Raises:
        ValueError: if it is not a regular expression, or takes too long, as `(a+)+b` may.
    """
    check_regex(field, pattern)
    compiled, deadline, found = regex.compile(pattern), time.monotonic() + SECONDS, set()
    for name in names:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))] if ends else [0]
        for start in starts:
            try:
                if compiled.fullmatch(name, start, timeout=max(deadline - time.monotonic(), 1e-3)):
                    found.add(name)
                    break
            except TimeoutError:
                raise ValueError(
                    f"{field} has {quote(pattern)}, which takes more than {SECONDS:g} s to match against the names of the "
                    "layers; write it without repetitions inside repetitions, or list the names."
                ) from None
    return found
