"""Recipes: named values for the fields that a user leaves open."""

from __future__ import annotations

from typing import Any


_BEST: dict[str, Any] = {
    "metric": "kfac",
    "allocation": "global",
    "layout": "pivoted",
    "structures": ["rank", "shared", "width"],
    "compensation": ["sequential"],
    "probed_images": 64,
    "min_rank_ratio": 0.05,
    "num_samples": 512,
    "closed_form_images": None,
}

# Decomposition on the mean input, gradual greedy ranks and trained low-rank residuals (arXiv 2402.06004).
_PAPER: dict[str, Any] = {
    "metric": "mean_input",
    "allocation": "greedy",
    "layout": "factors",
    "structures": ["rank"],
    "compensation": ["residual"],
    "probed_images": 0,
    "min_rank_ratio": 0.1,
    "num_samples": 512,
    "closed_form_images": None,
}

RECIPES: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    # The same with all directions of the inputs in place of those of their mean over images.
    "paper_second_moment": {**_PAPER, "metric": "second_moment"},
    # One forward pass, closed form.
    "fast": {
        "metric": "second_moment",
        "allocation": "uniform",
        "layout": "pivoted",
        "structures": ["rank"],
        "compensation": [],
        "probed_images": 0,
        "min_rank_ratio": 0.05,
        "num_samples": 512,
        "closed_form_images": None,
    },
    "best": _BEST,
    # Then trained on a few thousand images. The closed form learns few values and needs no more than this from them.
    "distilled": {
        **_BEST,
        "compensation": ["sequential", "distillation"],
        "num_samples": 10_000,
        "closed_form_images": 2048,
    },
}
"""The fields that each recipe fills in. A pivoted layer has twice the break-even rank, hence half the `min_rank_ratio`."""
