"""Shares and changes as they are read."""

from __future__ import annotations


def percent(share: float, digits: int = 1) -> str:
    """`60.0 %`, with a space that no line breaks at."""
    return f"{100 * share:.{digits}f}\u00a0%"


def change(before: float, after: float) -> str:
    """`−60.0 %`; nothing where there is nothing to compare with."""
    if before == 0:
        return ""
    # A minus sign is as wide as a plus sign; a hyphen is not.
    return f"{100 * (after / before - 1):+.1f}\u00a0%".replace("-", "−")
