"""Numbers as people read them, and values of untrusted files as messages may quote them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_count(count: int) -> str:
    """Format a count in at most six characters and a unit: `950`, `25.6 k` or `1.23 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # So that 999,999 is 1.00 M rather than 1000.0 k.
        if count / size >= 0.99995:
            digits = 1 if count / size >= 10 else 2
            return f"{count / size:.{digits}f} {unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Format an amount of memory: `1.23 GiB` or `45 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def counted(count: int, noun: str) -> str:
    """Return a number of things: `1 image` or `1,024 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def with_article(noun: str) -> str:
    """Return a noun, such as the name of a class, after `a` or `an`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def type_of(value: object) -> str:
    """Return the name of a value's class after `a` or `an`."""
    return with_article(type(value).__name__)


def format_percent(share: float, digits: int = 1) -> str:
    """Format a share as `60.0 %`, with a non-breaking space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def format_change(before: float, after: float) -> str:
    """Format a relative change as `−60.0 %`; the empty string if `before` is zero."""
    if before == 0:
        return ""
    # A minus sign is as wide as a plus sign; a hyphen is not.
    return f"{100 * (after / before - 1):+.1f}\u00a0%".replace("-", "−")


def format_size(sizes: Iterable[int]) -> str:
    """Format the sides of an image or the shape of a tensor as `3 x 224 x 224`."""
    return " x ".join(map(str, sizes))


def format_duration(seconds: float) -> str:
    """Format a duration: `0.12 s`, `12.3 s`, `2 min 5 s` or `1 h 2 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_milliseconds(seconds: float) -> str:
    """Format a short time as `84.2 ms`, with three digits: `1.23 ms`, `842 ms`."""
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f} ms"


def shorten(text: str, limit: int = 200) -> str:
    """Return a text for a message: at most `limit` characters and an ellipsis, and no character that a terminal obeys."""
    kept = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[:limit])
    return kept if len(text) <= limit and len(kept) <= limit else f"{kept[:limit]}…"


def listed(names: Sequence[str]) -> str:
    """Return the first five names for a message, and an ellipsis if there are more."""
    return ", ".join([*map(shorten, names[:5]), *(["…"] if len(names) > 5 else [])])


def quote(value: object, limit: int = 200) -> str:
    """Return `repr` of a value for a message, as `shorten` does; the value may come from an untrusted file."""
    try:
        return shorten(repr(value[: limit + 1] if isinstance(value, str) else value), limit)
    except (ValueError, RecursionError):
        # Python refuses to print integers of more than 4300 digits, and what is nested very deeply.
        return f"<{type(value).__name__} too large to print>"
