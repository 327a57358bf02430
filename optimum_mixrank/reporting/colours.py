"""Colours of pictures and pages, named for what they show, on a light and on a dark background."""

from __future__ import annotations


INK, GRID, PAPER = "#2c3e50", "#e5e7e9", "#fefefe"
"""Text and axes; grid lines; the gaps between coloured areas (not quite the white of text on bars)."""

FACTORED, DENSE, EXCLUDED, BREAK_EVEN = "#3b75af", "#f0a04b", "#d5d8dc", "#b03a2e"

SHARED, WIDTH = "#23796a", "#d3c8ec"
"""Ranks of layers with a common first factor; what is left of hidden units."""

SERIES = ("#3a76b1", "#c2661a", "#2f8f5b", "#8a5bb5", "#c2416b", "#1c8594", "#8c6239", "#6b7785")
"""Kinds of layers, in forward order."""

UNITS = SERIES[3]
"""Numbers of hidden units."""

ON_DARK = {
    INK: "#e3e8ee",
    GRID: "#323a44",
    PAPER: "#12161c",
    FACTORED: "#3f7fc0",
    DENSE: "#94601f",
    EXCLUDED: "#454e59",
    BREAK_EVEN: "#ff9184",
    SHARED: "#2a7d6e",
    WIDTH: "#463c63",
}
ON_DARK.update(
    zip(SERIES, ("#6ba6dd", "#f0a04b", "#5cc58a", "#bb98e3", "#f2819f", "#4fc0cf", "#cba57d", "#a3adb8"), strict=True)
)
"""The colour that replaces each of these on a dark background."""
