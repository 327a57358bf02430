"""Numbers as they are read: shares, changes, counts, bytes and durations."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """`1.23 GiB` or `45 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """`0.12 s`, `12.3 s`, `2 min 5 s` or `1 h 2 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float) -> str:
    """`950`, `25.6 k` or `1.3 M`."""
    if number < 1000:
        return f"{number:.0f}"
    return f"{number / 1e3:.1f} k" if number < 1e6 else f"{number / 1e6:.1f} M"


def size(num_bytes: float) -> str:
    """`4.7 MB`."""
    return f"{count(num_bytes)}B" if num_bytes >= 1000 else f"{num_bytes:.0f} B"


def format_count(count: int) -> str:
    """A number of parameters or FLOPs in at most six characters and a unit: `85.8 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # So that 999,999 is 1.00 M rather than 1000.0 k.
        if count / size >= 0.99995:
            digits = 1 if count / size >= 10 else 2
            return f"{count / size:.{digits}f} {unit}"
    return str(count)


def percent(share: float, digits: int = 1) -> str:
    """`60.0 %`, with a space that no line breaks at."""
    return f"{100 * share:.{digits}f}\u00a0%"


def change(before: float, after: float) -> str:
    """`−60.0 %`; nothing where there is nothing to compare with."""
    if before == 0:
        return ""
    # A minus sign is as wide as a plus sign; a hyphen is not.
    return f"{100 * (after / before - 1):+.1f}\u00a0%".replace("-", "−")
