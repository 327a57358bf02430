"""Accuracy of several methods on a ViT-S, from `benchmarks/results`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from optimum_mixrank.reporting.colours import BREAK_EVEN, GRID, INK, SERIES


TITLE = "Top-1 of ViT-S with half and with 40 % of the encoder's parameters"
DESCRIPTION = (
    "Top-1 accuracy on 1,000 images of ten ImageNet classes, means of three seeds (of the "
    "paper's method, one). Plain and diagonally scaled SVD fall to chance; the second moment of the inputs keeps about "
    "half, and the paper's method, on the mean input, less; with the paper's greedy ranks and residuals the second moment "
    "keeps more; this library's closed form stays within a few points of the original."
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
METHODS = {
    "svd": "plain SVD",
    "asvd-like": "diagonal scaling",
    "second moment": "second moment",
    "paper": "paper,\nmean input",
    "paper, second moment": "paper,\nsecond moment",
    "best": "optimum-mixrank\n(closed form)",
}
KEPT = (0.5, 0.4)


def draw() -> Figure:
    """Draw one row per method, one dot per budget, and a line for the original."""
    record = json.loads((RESULTS / "vit_s_methods.json").read_text(encoding="utf-8"))
    measured = {
        method: label for method, label in METHODS.items() if any(r["method"] == method for r in record["rows"])
    }
    rows = {
        label: [
            statistics.mean(row["top1"] for row in record["rows"] if (row["method"], row["asked"]) == (method, kept))
            for kept in KEPT
        ]
        for method, label in measured.items()
    }

    figure = Figure(figsize=(5.8, 3.1), layout="constrained")
    axes = figure.subplots()
    for column, (colour, marker, kept) in enumerate(zip(SERIES, "os", KEPT, strict=False)):
        label = f"{100 * kept:.0f} % kept"
        for y, values in enumerate(rows.values()):
            value, height = 100 * values[column], y + 0.36 * (column - 0.5)
            axes.plot(value, height, marker, color=colour, markersize=6.5, label=label if y == 0 else None)
            axes.annotate(
                f"{value:.1f}",
                (value, height),
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8.5,
            )
    original = 100 * record["original_top1"]
    axes.axvline(original, color=BREAK_EVEN, linewidth=1.3, label=f"original, {original:.1f} %")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.45, -0.55), xlabel="top-1 (%)")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, 1.0))
    return figure
