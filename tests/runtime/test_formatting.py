import pytest

from optimum_mixrank.runtime.formatting import (
    format_bytes,
    format_change,
    format_count,
    format_duration,
    format_percent,
    listed,
    quote,
    shorten,
    type_of,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (25_600, "25.6 k"),
        (999_999, "1.00 M"),
        (85_800_000, "85.8 M"),
        (35_100_000_000, "35.1 G"),
        (2_500_000_000_000, "2.50 T"),
    ],
)
def test_counts(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(("count", "text"), [(3 * 2**29, "1.50 GiB"), (5 * 2**20, "5 MiB")])
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (12.34, "12.3 s"), (125.4, "2 min 5 s"), (3599.6, "1 h 0 min"), (3723, "1 h 2 min")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_shares_have_a_space_at_which_no_line_breaks():
    assert [format_percent(0.6), format_percent(0.87654, 2)] == ["60.0\u00a0%", "87.65\u00a0%"]


@pytest.mark.parametrize(
    ("before", "after", "text"), [(50, 20, "−60.0\u00a0%"), (20, 50, "+150.0\u00a0%"), (0, 1, "")]
)
def test_changes(before, after, text):
    assert format_change(before, after) == text


@pytest.mark.parametrize("value", ["layer.0", 5, None, ["a", 1], {"a": "b"}, True, 0.5, "it's"], ids=repr)
def test_short_values_are_quoted_as_they_are(value):
    assert quote(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x" * 10**6], {"x" * 10**6: 1}, 10**5000, "\x1b[31m" * 10**5, b"\x1b" * 10**5, "\u202e" * 500],
    ids=lambda value: type(value).__name__,
)
def test_long_values_are_cut(value):
    assert len(quote(value)) <= 201 and quote(value).isprintable()


def test_control_characters_are_escaped():
    assert shorten("a\x1b[31mb\nc\u202e") == r"a\x1b[31mb\nc\u202e"
    assert shorten("abc", 2) == "ab…"


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a", "b"], "a, b"), (list("abcde"), "a, b, c, d, e"), (list("abcdef"), "a, b, c, d, e, …")],
)
def test_lists_of_names_end_after_five(names, text):
    assert listed(names) == text


def test_listed_names_are_shortened():
    assert listed(["a" * 300, "b\x1b"]) == f"{'a' * 200}…, b\\x1b"


@pytest.mark.parametrize(("value", "text"), [(1, "an int"), ([], "a list"), (IndexError(), "an IndexError")])
def test_types_have_their_article(value, text):
    assert type_of(value) == text
