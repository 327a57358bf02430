"""Compressed models of a given structure and size with random weights, which do not matter for their speed.

A new structure is a function with an entry in `STRUCTURES`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_mixrank import LowRankLinear, PivotedLinear, find_targets
from optimum_mixrank.checkpoint.factorize import insert_layer
from optimum_mixrank.checkpoint.names import Target, joint_target
from optimum_mixrank.checkpoint.narrowing import selected_columns, selected_rows


def pivoted(model: PreTrainedModel, kept: float, multiple: int = 8) -> None:
    """Every layer pivoted."""
    for target in find_targets(model):
        insert_layer(model, target, _pivoted(target.module, kept, multiple))


def pivoted_any_rank(model: PreTrainedModel, kept: float) -> None:
    """Every layer pivoted, of ranks that are multiples of no power of two."""
    for target in find_targets(model):
        layer = _pivoted(target.module, kept, 1)
        rank = layer.rank - (layer.rank + 1) % 2
        insert_layer(model, target, _random_pivoted(target.module, rank))


def factors(model: PreTrainedModel, kept: float) -> None:
    """Every layer as plain factors."""
    for target in find_targets(model):
        m, n = target.shape
        rank = max(8, int(kept * m * n / (m + n)) // 8 * 8)
        insert_layer(model, target, LowRankLinear(n, m, rank))


def shared(model: PreTrainedModel, kept: float) -> None:
    """Query, key and value share a pivoted layer; every other layer is pivoted."""
    attention, others = _attention_inputs(find_targets(model))
    for members in attention:
        joint = joint_target(members)
        insert_layer(model, joint, _pivoted(joint.module, kept, 8))
    for target in others:
        insert_layer(model, target, _pivoted(target.module, kept, 8))


def width(model: PreTrainedModel, kept: float) -> None:
    """MLPs with fewer units, dense; query, key and value share a pivoted layer; the output of attention is pivoted."""
    targets = find_targets(model)
    for target in _narrowed(model, targets, kept):
        targets.remove(target)
    attention, others = _attention_inputs(targets)
    for members in attention:
        joint = joint_target(members)
        insert_layer(model, joint, _pivoted(joint.module, kept, 8))
    for target in others:
        insert_layer(model, target, _pivoted(target.module, kept, 8))


STRUCTURES: dict[str, Callable[[PreTrainedModel, float], None]] = {
    "pivoted": pivoted,
    "pivoted, odd ranks": pivoted_any_rank,
    "factors": factors,
    "shared": shared,
    "width": width,
}
"""By name: changes a dense model in place so that about this share of the values of its encoder is kept."""


def compressed(dense: PreTrainedModel, structure: str, kept: float) -> PreTrainedModel:
    """A copy of a dense model in a structure, in evaluation mode."""
    torch.manual_seed(0)
    model = copy.deepcopy(dense)
    STRUCTURES[structure](model, kept)
    return model.eval()


def _pivoted(dense: nn.Linear, kept: float, multiple: int) -> PivotedLinear:
    """A pivoted layer of the largest rank that is a multiple and keeps no more than this share of the values."""
    m, n = dense.weight.shape
    rank = (m + n - math.sqrt((m + n) ** 2 - 4 * kept * m * n)) / 2
    return _random_pivoted(dense, max(multiple, int(rank) // multiple * multiple))


def _random_pivoted(dense: nn.Linear, rank: int) -> PivotedLinear:
    pivots = torch.randperm(dense.out_features)[:rank].sort().values.tolist()
    return PivotedLinear(dense.in_features, dense.out_features, rank, dense.bias is not None, pivots=pivots)


def _attention_inputs(targets: Sequence[Target]) -> tuple[list[list[Target]], list[Target]]:
    """Query, key and value of each block, and the other layers."""
    groups: dict[str, list[Target]] = {}
    others = []
    for target in targets:
        parent, _, last = target.canonical_name.rpartition(".")
        if last in ("query", "key", "value"):
            groups.setdefault(parent, []).append(target)
        else:
            others.append(target)
    return list(groups.values()), others


def _narrowed(model: PreTrainedModel, targets: Sequence[Target], kept: float) -> list[Target]:
    """Remove units of all MLPs, and return their layers."""
    units = model.config.intermediate_size
    left = torch.arange(max(8, round(kept * units) // 8 * 8))
    first = [target for target in targets if target.module.out_features == units]
    second = [target for target in targets if target.module.in_features == units]
    for target in first:
        insert_layer(model, target, selected_rows(target.module, left))
    for target in second:
        insert_layer(model, target, selected_columns(target.module, left))
    return [*first, *second]
