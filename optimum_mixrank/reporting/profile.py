"""Structures and predicted losses over budgets, as lines of text and as a picture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation.choice import LayerChoice
from ..allocation.profile import BudgetPoint
from .colours import DENSE, FACTORED, GRID, INK, SERIES, SHARED, WIDTH
from .data import ReportData
from .plots import STYLE, picture_path, save_picture
from .structure import block_table


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BECOMES: dict[str, tuple[str, Callable[[LayerChoice], bool]]] = {
    "fewer hidden units": (WIDTH, lambda choice: choice.width is not None),
    "a shared first factor": (SHARED, lambda choice: choice.shared),
    "factors of its own": (FACTORED, lambda choice: choice.rank is not None),
    "dense": (DENSE, lambda choice: True),
}
"""What a layer becomes, and its colour; the first that applies."""


@dataclass(frozen=True)
class MeasuredBudget:
    """What a compression by one ratio has really changed.

    Attributes:
        ratio: Its `compression_ratio`.
        loss: The predicted loss at that ratio.
        kl: KL of its predictions from the original's, in nats.
        agreement: Share of images that get the same class.
        num_images: Number of images that were compared.
    """

    ratio: float
    loss: float
    kl: float
    agreement: float
    num_images: int

    def at(self, loss: float) -> tuple[float, float]:
        """Return estimates of KL and agreement where another loss is predicted."""
        scale = loss / self.loss
        return self.kl * scale, max(0.0, 1 - (1 - self.agreement) * scale**0.5)


_MAX_TICKS = 9
"""As many budgets have room for a tick each."""


@dataclass(frozen=True)
class RankProfile:
    """Structures and predicted losses for several budgets.

    Attributes:
        points: The budgets by ascending ratio.
        unit: The unit of the losses.
        measured: The budget by which losses were calibrated, if they were: see `calibrated`.
    """

    points: Sequence[BudgetPoint]
    unit: str
    measured: MeasuredBudget | None = None

    def __str__(self) -> str:
        timed = any(point.latency is not None for point in self.points)
        columns = [f"{'time':>7}"] * timed + [f"{'KL':>8}", f"{'agreement':>9}"] * (self.measured is not None)
        lines = ["  ".join([f"{'ratio':>7}", f"{'kept':>7}", *columns, f"predicted loss ({self.unit})"])]
        for point in self.points:
            cells = [f"{point.ratio:>7.1%}", f"{point.kept:>7.1%}"]
            cells += [] if point.latency is None else [f"{point.latency:>7.3f}"]
            if self.measured is not None:
                kl, agreement = self.measured.at(point.loss)
                cells += [f"{kl:>8.3g}", f"{agreement:>9.1%}"]
            lines.append(", ".join(["  ".join([*cells, f"{point.loss:.4g}"]), *_structures(point.choices.values())]))
        if self.measured is not None:
            lines.append(
                f"KL and agreement are estimated from one compression, by {self.measured.ratio:.1%}: KL "
                f"{self.measured.kl:.3g} nats and agreement {self.measured.agreement:.1%} on "
                f"{self.measured.num_images:,} images."
            )
        for point in self.points:
            note = "; * one first factor for several layers" if _any_shared(point) else ""
            lines += ["", f"Ranks at ratio {point.ratio:.1%}{note}", *block_table(point.choices)]
        return "\n".join(lines)

    def calibrated(self, report: ReportData) -> RankProfile:
        """Return the profile with estimates of KL and agreement, from one compression that was compared with the original.

        Losses of other budgets are scaled by what KL over predicted loss is there; the share of images that get another
        class grows with the square root of KL, as it does where logits are changed by small random amounts.

        Args:
            report: The report of a compression of the same model with the same settings, by one of these ratios.

        Raises:
            ValueError: if its ratio is none of these, or agreement and KL were not measured.
        """
        ratio, found = report.settings.get("compression_ratio"), report.fidelity
        same = next((point for point in self.points if point.ratio == ratio and point.loss > 0), None)
        if same is None:
            known = ", ".join(f"{point.ratio:g}" for point in self.points)
            raise ValueError(f"The measured compression_ratio={ratio!r} is not one of the profile's: {known}.")
        if found.get("kl") is None or found.get("agreement") is None:
            raise ValueError(
                "The measured compression has no agreement and KL: its model predicts no classes, or gives NaN or Inf."
            )
        return replace(
            self,
            measured=MeasuredBudget(same.ratio, same.loss, found["kl"], found["agreement"], found["num_images"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values, with the ranks of every budget beside its structures."""
        content = asdict(self)
        for point, values in zip(self.points, content["points"], strict=True):
            values["ranks"] = point.ranks
            if self.measured is not None:
                values["estimated_kl"], values["estimated_agreement"] = self.measured.at(point.loss)
        if self.measured is None:
            del content["measured"]
        return content

    def plot(self, path: str | Path) -> Path:
        """Draw over the budgets: the predicted loss, the mean rank of every kind of layer, and what layers become.

        Layers are of one kind if their names differ only in numbers.

        Args:
            path: The file to write; its suffix gives the format: `.png`, `.svg` or `.pdf`.

        Returns:
            The path of the file.

        Raises:
            ValueError: for another suffix.
        """
        # matplotlib takes a while to import; figures made without pyplot need no display and leave no global state.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        path = picture_path(path)
        removed = [100 * point.ratio for point in self.points]
        with rc_context(STYLE):
            figure = Figure(figsize=(12, 3.9), dpi=150, layout="constrained")
            left, middle, right = figure.subplots(1, 3)
            left.plot(removed, [point.loss for point in self.points], "o-", color=FACTORED)
            left.set(ylabel=f"predicted loss ({self.unit})", ylim=(0, None))
            _draw_mean_ranks(middle, removed, self.points)
            _draw_structures(right, removed, self.points)
            what = "parameters" if self.points[0].latency is None else "time"
            for axes in (left, middle, right):
                axes.set(xlabel=f"{what} removed (%)")
                if axes is not right and len(removed) <= _MAX_TICKS:
                    axes.set_xticks(removed, [f"{value:g}" for value in removed])
                axes.grid(axis="y" if axes is right else "both", color=GRID, linewidth=0.7)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
            save_picture(figure, path)
        return path


def _structures(choices: Collection[LayerChoice]) -> list[str]:
    """Describe what other structures than factors of their own the layers have."""
    shared = sum(choice.shared for choice in choices)
    narrow = sum(choice.width is not None for choice in choices)
    found = [f"{shared} of {len(choices)} layers share a first factor"] if shared else []
    return [*found, f"{narrow} layers have fewer hidden units"] if narrow else found


def _any_shared(point: BudgetPoint) -> bool:
    return any(choice.shared for choice in point.choices.values())


def _draw_mean_ranks(axes: Axes, removed: Sequence[float], points: Sequence[BudgetPoint]) -> None:
    kinds: dict[str, list[str]] = {}
    for name in points[0].choices:
        kinds.setdefault(re.sub(r"\d+", "*", name).split("*.")[-1], []).append(name)
    for colour, (kind, names) in zip(itertools.cycle(SERIES), kinds.items(), strict=False):
        means = []
        for point in points:
            ranks = [rank for name in names if (rank := point.choices[name].rank) is not None]
            means.append(sum(ranks) / len(ranks) if ranks else float("nan"))
        axes.plot(removed, means, "o-", markersize=4, color=colour, label=kind)
    axes.set(ylabel="mean rank of the factored layers", ylim=(0, None))
    _legend(axes, 2)


def _draw_structures(axes: Axes, removed: Sequence[float], points: Sequence[BudgetPoint]) -> None:
    """Draw a bar for every budget, divided by what layers become."""
    bottom = [0.0] * len(points)
    became = [[_structure(choice) for choice in point.choices.values()] for point in points]
    positions = range(len(points))
    for label, (colour, _) in _BECOMES.items():
        shares = [100 * names.count(label) / max(len(names), 1) for names in became]
        if any(shares):
            axes.bar(positions, shares, bottom=bottom, color=colour, width=0.8, label=label)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_xticks(positions, [f"{ratio:g}" for ratio in removed])
    axes.set(ylabel="layers (%)", ylim=(0, 100))
    _legend(axes, 2)


def _legend(axes: Axes, columns: int) -> None:
    """Add a legend above the axes, where it hides nothing."""
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )


def _structure(choice: LayerChoice) -> str:
    return next(label for label, (_, applies) in _BECOMES.items() if applies(choice))
