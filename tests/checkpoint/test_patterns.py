"""Patterns mean what `re` says they mean, and take no longer than they may."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mixrank.checkpoint import patterns
from optimum_mixrank.checkpoint.patterns import check_regex, is_end, matching


NAMES = [f"encoder.layer.{block}.{part}" for block in (0, 1, 10) for part in ("attention.key", "output.dense")]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.key",
        "encoder.layer.0.attention.key",
        r".*layer\.1\..*",
        "key",
        r".*(key|dense)",
        r"(?:.*)(?<=output\.)dense",
    ],
)
def test_whole_names(pattern):
    assert matching("field", pattern, NAMES) == {name for name in NAMES if re.fullmatch(pattern, name)}


@pytest.mark.parametrize(
    "pattern",
    ["key", "attention.key", r"0.*(key|dense)", "ey", r"\d\.output\.dense", "^key", ".*", r"layer\.1", "a|key"],
)
def test_ends_of_names(pattern):
    expected = {name for name in NAMES if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)}
    assert matching("field", pattern, NAMES, ends=True) == expected


@given(st.from_regex(r"(?:[a-z.]|\\d|\(a\|b\)|\.\*|[a-z]\?){1,6}", fullmatch=True))
def test_any_ends_of_names(pattern):
    expected = {name for name in NAMES if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)}
    assert matching("field", pattern, NAMES, ends=True) == expected


@pytest.mark.parametrize("pattern", ["(?i)KEY", "(?x)key # of the attention", "(?is)K.Y"])
def test_flags_at_the_start(pattern):
    assert matching("field", pattern, NAMES, ends=True) == {name for name in NAMES if name.endswith(".key")}


def test_ends():
    assert is_end("layer.0.key", "0.key") and is_end("key", "key")
    assert not is_end("layer.10.key", "0.key") and not is_end("monkey", "key")


@pytest.mark.parametrize("ends", [False, True])
def test_a_pattern_that_backtracks_for_ever(ends, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"field has .* which takes more than 0\.2 s"):
        matching("field", "(?:a|aa)+!", ["a" * 100] * 100, ends)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "pattern",
    ["(", "[a", "a{99999999999999999999}", "(" * 4000 + ")" * 4000, "((a{1000}){1000}){1000}", "a(?i)", "*", "(?P<a>"],
    ids=lambda pattern: pattern[:25],
)
def test_patterns_that_are_none(pattern):
    with pytest.raises(ValueError, match="field has .* which is not a valid regular expression"):
        check_regex("field", pattern)


def test_a_pattern_that_is_too_long():
    with pytest.raises(ValueError, match="field has a pattern of 10,001 characters"):
        check_regex("field", "a" * 10_001)
