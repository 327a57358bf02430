"""Predicted loss over budgets, as lines of text and as a picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..allocation.choice import LayerChoice
from ..allocation.profile import BudgetPoint


def _structures(choices: Collection[LayerChoice]) -> list[str]:
    """Describe what other structures than factors of their own the layers have."""
    shared = sum(choice.shared for choice in choices)
    narrow = sum(choice.width is not None for choice in choices)
    found = [f"{shared} of {len(choices)} layers share a first factor"] if shared else []
    return [*found, f"{narrow} have fewer hidden units"] if narrow else found


@dataclass(frozen=True)
class RankProfile:
    """Ranks and predicted losses for several budgets.

    Attributes:
        points: The budgets by ascending ratio.
        unit: The unit of the losses.
    """

    points: Sequence[BudgetPoint]
    unit: str

    def __str__(self) -> str:
        lines = [f"{'ratio':>7}  {'kept':>7}  predicted loss ({self.unit})"]
        for point in self.points:
            line = f"{point.ratio:>7.1%}  {point.kept:>7.1%}  {point.loss:.4g}"
            lines.append(", ".join([line, *_structures(point.choices.values())]))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the predicted loss and the mean rank of every kind of layer over the budgets.

        Layers are of one kind if their names differ only in numbers.

        Args:
            path: The file to write; its suffix gives the format: `.png`, `.svg` or `.pdf`.

        Returns:
            The path of the file.
        """
        # matplotlib takes a while to import; figures made without pyplot need no display and leave no global state.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        path = Path(path).expanduser()
        removed = [100 * point.ratio for point in self.points]
        kinds: dict[str, list[str]] = {}
        for name in self.points[0].ranks:
            kinds.setdefault(re.sub(r"\d+", "*", name).split("*.")[-1], []).append(name)
        with rc_context({"svg.hashsalt": "mixrank", "font.size": 9}):
            figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
            left, right = figure.subplots(1, 2)
            left.plot(removed, [point.loss for point in self.points], marker="o", color="#3b75af")
            left.set(xlabel="parameters removed (%)", ylabel=f"predicted loss ({self.unit})", ylim=(0, None))
            for kind, names in kinds.items():
                means = []
                for point in self.points:
                    ranks = [rank for name in names if (rank := point.ranks[name]) is not None]
                    means.append(sum(ranks) / len(ranks) if ranks else float("nan"))
                right.plot(removed, means, marker=".", label=kind)
            right.set(xlabel="parameters removed (%)", ylabel="mean rank of the factored layers", ylim=(0, None))
            right.legend(fontsize=7)
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})
        return path
