"""Named sets of choices: how the fields that a user leaves open are filled."""

from __future__ import annotations

from typing import Any


RECIPES: dict[str, dict[str, Any]] = {
    # Activation-aware decomposition, gradual greedy ranks and trained low-rank residuals (arXiv 2402.06004), with the
    # full second moment in place of the mean input, which loses far more.
    "paper": {
        "metric": "second_moment",
        "allocation": "greedy",
        "layout": "factors",
        "compensation": ["residual"],
    },
    # One forward pass, closed form.
    "fast": {
        "metric": "second_moment",
        "allocation": "uniform",
        "layout": "pivoted",
        "compensation": [],
    },
    "best": {
        "metric": "kfac",
        "allocation": "global",
        "layout": "pivoted",
        "compensation": ["sequential"],
    },
}
"""Values of `metric`, `allocation`, `layout` and `compensation` by the name of the recipe."""
