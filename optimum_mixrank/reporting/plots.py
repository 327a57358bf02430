"""A report as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..layout import break_even
from .report import CompressionReport, LayerReport
from .table import format_count


if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FACTORED, _DENSE, _EXCLUDED, _BREAK_EVEN, _INK = "#3b75af", "#f0a04b", "#d5d8dc", "#b03a2e", "#2c3e50"
_NARROWEST_LABELLED = 12
"""Points that a bar needs for its rank to be written at it, upright if need be."""
_FORMATS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def plot_ranks(report: CompressionReport, path: str | Path) -> Path:
    """Draw the rank of every layer over depth, one row per kind of layer.

    A bar is the rank as a share of the full rank `min(m, n)`, with the rank written at it. A line across it marks the
    break-even rank of the layout, from which on factors are no smaller than the dense weight. Dense and excluded
    layers have full bars in colours of their own. Layers are of one kind if their names differ in numbers only.

    Args:
        report: What to draw.
        path: Where to; the suffix says how: `.png`, `.svg` or `.pdf`.

    Returns:
        The file.

    Raises:
        ValueError: for another suffix, or a report without layers.
    """
    # matplotlib takes a while to import; figures made without pyplot need no display and leave no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(path)
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path.name!r} has the suffix {path.suffix!r}; choose one of {', '.join(_FORMATS)}.")
    if not report.layers:
        raise ValueError("The report has no layer to draw.")
    layout = str(report.settings.get("layout", "factors"))
    depths = _depths(report.layers)
    kinds = _kinds(report.layers)
    num_slots = max(depths.values()) + 1
    width = min(max(2.6 + 0.42 * num_slots, 7.0), 24.0)
    height = 1.75 + 0.95 * len(kinds)

    # A fixed salt and no date: the same report gives the same file.
    style = {"svg.hashsalt": "mixrank", "font.size": 9, "hatch.linewidth": 0.6, "axes.edgecolor": _INK}
    with rc_context(style):
        figure = Figure(figsize=(width, height), dpi=150)
        rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0].tolist()
        room = 72 * (width - 2.6) / num_slots
        for axes, (label, layers) in zip(rows, kinds.items(), strict=True):
            _draw_kind(axes, label, [(depths[layer.name], layer) for layer in layers], room, layout)
        _label_depth(rows[-1], report.layers, depths, num_slots, room)
        before, after = report.model_parameters_before, report.model_parameters_after
        figure.suptitle(
            f"{format_count(before)} → {format_count(after)} parameters "
            f"({report.removed_of_model:.1%} of the model removed)",
            fontsize=12,
            fontweight="bold",
            color=_INK,
            y=1 - 0.18 / height,
        )
        _add_legend(figure, report.layers, y=1 - 0.42 / height)
        figure.subplots_adjust(left=1.95 / width, right=1 - 0.3 / width, top=1 - 0.85 / height, bottom=0.55 / height)
        metadata: dict[str, Any] = {} if form == "png" else {"Date" if form == "svg" else "CreationDate": None}
        figure.savefig(path, format=form, metadata=metadata)
    return path


@dataclass(frozen=True)
class _Name:
    """A layer's name, taken apart.

    Attributes:
        kind: The parts that are no numbers.
        numbers: The parts that are: where the layer stands.
    """

    kind: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> _Name:
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        return cls(tuple(part for part in parts if not part.isdecimal()), numbers)


def _depths(layers: Sequence[LayerReport]) -> dict[str, int]:
    """Position of every layer on the axis of depth: the number of its block, counted over all stages.

    A layer that belongs to a stage rather than to a block, such as the reduction of Swin's patch merging, stands at
    the last block before it.
    """
    names = {layer.name: _Name.parse(layer.name) for layer in layers}
    levels = max(len(name.numbers) for name in names.values())
    slots: dict[tuple[int, ...], int] = {}
    depths = {}
    last = 0
    for layer in layers:
        numbers = names[layer.name].numbers
        if len(numbers) == levels or not slots:
            last = slots.setdefault(numbers, len(slots))
        depths[layer.name] = last
    return depths


def _kinds(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by kind, which is called by as many last parts of its name as tell it from the other kinds."""
    groups: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(_Name.parse(layer.name).kind, []).append(layer)
    return {_shortest_suffix(kind, list(groups)): members for kind, members in groups.items()}


def _shortest_suffix(kind: tuple[str, ...], kinds: Sequence[tuple[str, ...]]) -> str:
    for length in range(1, len(kind)):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return ".".join(kind[-length:])
    return ".".join(kind)


def _draw_kind(axes: Axes, label: str, layers: Sequence[tuple[int, LayerReport]], room: float, layout: str) -> None:
    """One row: bars with ranks, each with its break-even line; `room` is the width of a slot in points."""
    for depth, layer in layers:
        m, n = layer.shape
        full = min(m, n)
        axes.hlines(
            break_even(m, n, layout) / full, depth - 0.42, depth + 0.42, color=_BREAK_EVEN, linewidth=1.3, zorder=3
        )
        if layer.rank is not None:
            share, text, colour, hatch = layer.rank / full, str(layer.rank), _FACTORED, None
        elif layer.targeted:
            share, text, colour, hatch = 1.0, "dense", _DENSE, None
        else:
            share, text, colour, hatch = 1.0, "excl.", _EXCLUDED, "////"
        axes.bar(depth, share, width=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0, zorder=2)
        if room >= _NARROWEST_LABELLED:
            _write_on_bar(axes, depth, share, text, light=layer.rank is not None, upright=len(text) * 5.4 > room)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=7)
    axes.grid(axis="y", color="#e5e7e9", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, colors=_INK)
    axes.set_ylabel(
        f"{label}\n{_shapes([layer for _, layer in layers])}",
        rotation=0,
        ha="right",
        va="center",
        fontsize=8,
        color=_INK,
        labelpad=4,
    )


def _write_on_bar(axes: Axes, depth: int, share: float, text: str, light: bool, upright: bool) -> None:
    """Write into the head of a bar, or above a bar that is too short for it; so it never meets a break-even line."""
    inside = share > (0.36 if upright else 0.2)
    # The full bars of dense layers are crossed by the line; their word stands below it.
    head = share if light else 0.3
    axes.text(
        depth,
        head - 0.04 if inside else head + 0.04,
        text,
        ha="center",
        va="top" if inside else "bottom",
        rotation=90 if upright else 0,
        fontsize=7.5,
        color="white" if inside and light else _INK,
        zorder=4,
    )


def _shapes(layers: Sequence[LayerReport]) -> str:
    shapes = list(dict.fromkeys(f"{layer.shape[0]} x {layer.shape[1]}" for layer in layers))
    return shapes[0] if len(shapes) == 1 else f"{shapes[0]} …\n{shapes[-1]}"


def _label_depth(
    axes: Axes, layers: Sequence[LayerReport], depths: Mapping[str, int], num_slots: int, room: float
) -> None:
    labels: dict[int, str] = {}
    for layer in layers:
        numbers = ".".join(map(str, _Name.parse(layer.name).numbers))
        labels.setdefault(depths[layer.name], numbers)
    step = 1 + int(max(len(label) for label in labels.values()) * 5 // room)
    shown = [slot for slot in range(num_slots) if slot % step == 0]
    axes.set_xticks(shown, [labels[slot] for slot in shown], fontsize=8)
    axes.set_xlim(-0.6, num_slots - 0.4)
    nested = any("." in label for label in labels.values())
    axes.set_xlabel("stage.block" if nested else "block", color=_INK)


def _add_legend(figure: Any, layers: Sequence[LayerReport], y: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=_FACTORED, label="rank, share of full rank")]
    if any(layer.rank is None and layer.targeted for layer in layers):
        handles.append(Patch(color=_DENSE, label="stayed dense"))
    if any(layer.rank is None and not layer.targeted for layer in layers):
        handles.append(Patch(facecolor=_EXCLUDED, hatch="////", edgecolor="white", label="excluded, dense"))
    handles.append(Line2D([], [], color=_BREAK_EVEN, linewidth=1.3, label="break-even rank"))
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, y), ncols=len(handles), frameon=False, fontsize=8
    )
