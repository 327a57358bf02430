"""What layers have become together: factors that several share, and hidden units that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..allocation.choice import LayerChoice
from .data import LayerReport
from .depth import block_labels, depths_of, kinds_of


def product_shapes(layers: Sequence[LayerReport]) -> dict[str, tuple[int, int]]:
    """Return the shape of the matrix that the rank of every layer belongs to, by its name.

    This is its present shape, or that of all layers stacked that share its first factor.
    """
    present = {layer.name: layer.shape_after or layer.shape for layer in layers}
    shapes = {}
    for layer in layers:
        m, n = present[layer.name]
        if all(name in present for name in layer.members):
            m = sum(present[name][0] for name in layer.members) or m
        shapes[layer.name] = m, n
    return shapes


def shared_factors(layers: Sequence[LayerReport]) -> str:
    """Say how many layers share a first factor, as in `12 layers in 4 groups`; empty if none do."""
    groups = {layer.members for layer in layers if layer.members}
    if not groups:
        return ""
    return f"{sum(map(len, groups))} layers in {len(groups)} group{'s' if len(groups) > 1 else ''}"


def hidden_units(layers: Sequence[LayerReport]) -> str:
    """Say how many hidden units are left, as in `900 of 3,072, in 2 MLPs`; empty if none were removed."""
    # Each MLP has one layer that takes its hidden units in.
    narrow = [(layer.shape[1], layer.shape_after[1]) for layer in layers if layer.shape_after]
    narrow = [(before, after) for before, after in narrow if after < before]
    if not narrow:
        return ""
    before, after = map(sum, zip(*narrow, strict=True))
    return f"{after:,} of {before:,}, in {len(narrow)} MLP{'s' if len(narrow) > 1 else ''}"


def describe_encoder(layers: Sequence[LayerReport]) -> str:
    """Say in a part of a sentence what compression has made of the encoder."""
    parts = []
    if any(layer.rank is not None for layer in layers):
        parts.append("linear layers of the encoder are pairs of thin factors")
    if shared_factors(layers):
        parts.append("layers with the same input may share the first of them")
    if hidden_units(layers):
        parts.append("MLPs have fewer hidden units")
    *others, last = parts or ["all layers of the encoder are dense"]
    return f"{', '.join(others)}, and {last}" if others else last


class _Decided(NamedTuple):
    name: str
    choice: LayerChoice


def block_table(choices: Mapping[str, LayerChoice]) -> list[str]:
    """Return the structure of every layer as lines: one row per block, one column per kind of layer.

    A cell is a rank or `dense`; `*` marks the rank of a factor that layers share, and `64, 900 units` is a layer of an MLP
    that keeps 900 hidden units.

    Args:
        choices: By canonical name, in forward order.
    """
    layers = [_Decided(*item) for item in choices.items()]
    if not layers:
        return []
    depths, kinds = depths_of(layers), kinds_of(layers)
    cells = {(depths[each.name], kind): _cell(each.choice) for kind, members in kinds.items() for each in members}
    rows = [["block", *kinds]]
    rows += [
        [label, *(cells.get((position, kind), "") for kind in kinds)]
        for position, label in block_labels(layers, depths).items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _cell(choice: LayerChoice) -> str:
    rank = "dense" if choice.rank is None else f"{choice.rank}{'*' if choice.shared else ''}"
    return rank if choice.width is None else f"{rank}, {choice.width} units"
