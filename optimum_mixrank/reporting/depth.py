"""Where a layer stands in the model, read from its name: its depth and its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..checkpoint.linear_view import INSIDE


if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Named(Protocol):
    """Anything with the name of a layer, such as a `LayerReport`."""

    @property
    def name(self) -> str:
        """The canonical name of the layer."""


Layer = TypeVar("Layer", bound=Named)


def depths_of(layers: Sequence[Named]) -> dict[str, int]:
    """Return the position of every layer on the depth axis: the number of its block, counted over all stages.

    A layer that belongs to a stage rather than to a block, such as the reduction of Swin's patch merging, shares the
    position of the last block before it.
    """
    numbers = {layer.name: _split(layer.name)[1] for layer in layers}
    levels = max(map(len, numbers.values()))
    slots: dict[tuple[int, ...], int] = {}
    depths: dict[str, int] = {}
    last = 0
    for name, position in numbers.items():
        if len(position) == levels or not slots:
            last = slots.setdefault(position, len(slots))
        depths[name] = last
    return depths


def kinds_of(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Group layers whose names differ only in numbers; each group is labelled by its shortest unique name ending."""
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_split(layer.name)[0], []).append(layer)
    return {_shortest_suffix(kind, list(groups)): members for kind, members in groups.items()}


def _split(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Split a dotted name into its words, which say what kind of layer it is, and its numbers, which say where."""
    parts = name.split(".")
    words = tuple(part for part in parts if not part.isdecimal())
    return words, tuple(int(part) for part in parts if part.isdecimal())


def _shortest_suffix(kind: tuple[str, ...], kinds: Sequence[tuple[str, ...]]) -> str:
    # The last part of a layer inside a view is the same for all of them.
    for length in range(1 + (kind[-1] == INSIDE), len(kind)):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return ".".join(kind[-length:])
    return ".".join(kind)


def block_labels(layers: Sequence[Named], depths: Mapping[str, int]) -> dict[int, str]:
    """Return the number of the block at every position, `stage.block` if there are stages."""
    labels: dict[int, str] = {}
    for layer in layers:
        labels.setdefault(depths[layer.name], ".".join(map(str, _split(layer.name)[1])))
    return labels


def label_depth(axes: Axes, layers: Sequence[Named], depths: Mapping[str, int], room: float) -> None:
    """Number the blocks along the horizontal axis; `room` is the width of a block in points.

    Where blocks are narrow, only some of them are numbered.
    """
    labels = block_labels(layers, depths)
    step = 1 + int(max(map(len, labels.values())) * 5 // room)
    shown = range(0, len(labels), step)
    axes.set_xticks(shown, [labels[slot] for slot in shown], fontsize=8)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_xlabel("stage.block" if any("." in label for label in labels.values()) else "block")
