"""Where a layer stands: its depth and its kind, both from its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .data import LayerReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerName:
    """A layer's name, taken apart.

    Attributes:
        kind: The parts that are no numbers.
        numbers: The parts that are: where the layer stands.
    """

    kind: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> LayerName:
        """Take a dotted name apart."""
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        return cls(tuple(part for part in parts if not part.isdecimal()), numbers)


def depths_of(layers: Sequence[LayerReport]) -> dict[str, int]:
    """Position of every layer on the axis of depth: the number of its block, counted over all stages.

    A layer that belongs to a stage rather than to a block, such as the reduction of Swin's patch merging, stands at
    the last block before it.
    """
    names = {layer.name: LayerName.parse(layer.name) for layer in layers}
    levels = max(len(name.numbers) for name in names.values())
    slots: dict[tuple[int, ...], int] = {}
    depths: dict[str, int] = {}
    last = 0
    for layer in layers:
        numbers = names[layer.name].numbers
        if len(numbers) == levels or not slots:
            last = slots.setdefault(numbers, len(slots))
        depths[layer.name] = last
    return depths


def kinds_of(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by kind, which is called by as many last parts of its name as tell it from the other kinds."""
    groups: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(LayerName.parse(layer.name).kind, []).append(layer)
    return {_shortest_suffix(kind, list(groups)): members for kind, members in groups.items()}


def _shortest_suffix(kind: tuple[str, ...], kinds: Sequence[tuple[str, ...]]) -> str:
    for length in range(1, len(kind)):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return ".".join(kind[-length:])
    return ".".join(kind)


def label_depth(axes: Axes, layers: Sequence[LayerReport], depths: Mapping[str, int], room: float) -> None:
    """Number the blocks along the axis of depth.

    Args:
        axes: Whose horizontal axis it is.
        layers: All layers of the report.
        depths: See `depths_of`.
        room: Width of a block in points; where it is narrow, not every block gets its number.
    """
    labels: dict[int, str] = {}
    for layer in layers:
        numbers = ".".join(map(str, LayerName.parse(layer.name).numbers))
        labels.setdefault(depths[layer.name], numbers)
    step = 1 + int(max(len(label) for label in labels.values()) * 5 // room)
    shown = range(0, len(labels), step)
    axes.set_xticks(shown, [labels[slot] for slot in shown], fontsize=8)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    nested = any("." in label for label in labels.values())
    axes.set_xlabel("stage.block" if nested else "block")
