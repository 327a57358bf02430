"""Finished compensation work in the journal: factored layers, and all other values that have changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.factorize import (
    changed_layers,
    entry_within,
    insert_layer,
    layer_from_state,
    layer_of,
    values_beside,
)
from ..checkpoint.names import Target, joint_target
from ..checkpoint.rank_map import parse_rank_map
from ..runtime.distributed import Processes
from ..runtime.journal import Journal
from .compensator import CompensationResult, CompensationTask


_NAME = "compensated"


def save_steps(task: CompensationTask, results: Sequence[CompensationResult]) -> None:
    """Save the model after the steps finished so far, and their results."""
    if not task.journal.is_kept:
        return
    values = {"results": [dataclasses.asdict(result) for result in results]}
    with task.processes.raise_on_all_ranks():
        save_layers(task.journal, _NAME, task.model, task.targets, values, other=True)


def resume_steps(task: CompensationTask) -> list[CompensationResult]:
    """Restore the model as saved after the last finished step, and return the results of the finished steps."""
    values = load_layers(task.journal, _NAME, task.model, task.targets, task.processes)
    return [] if values is None else [CompensationResult(**result) for result in values["results"]]


def save_layers(
    journal: Journal,
    name: str,
    model: nn.Module,
    targets: Sequence[Target],
    values: Mapping[str, Any],
    other: bool = False,
) -> None:
    """Save the compressed layers among some of a model, and JSON values, as a journal entry that all processes share.

    With `other`, all other parameters and buffers of the model are saved too.
    """
    changed = changed_layers(model, targets)
    layers = {target.name: layer_of(model, target) for target in changed}
    entries = {target.name: entry_within(layers[target.name], target.module).to_dict() for target in changed}
    # The `weight` of a factored layer is an empty placeholder.
    tensors = {
        f"{layer}.{key}": tensor
        for layer, module in layers.items()
        for key, tensor in module.state_dict().items()
        if tensor.numel()
    }
    if other:
        tensors.update(values_beside(model, [layer.name for target in changed for layer in target.layers]))
    members = {target.name: [member.name for member in target.members] for target in changed if target.members}
    journal.save(name, tensors, {"layers": entries, "members": members, **values}, shared=True)


@torch.no_grad()
def load_layers(
    journal: Journal, name: str, model: nn.Module, targets: Sequence[Target], processes: Processes
) -> Mapping[str, Any] | None:
    """Put what `save_layers` saved into a compressed model, and return the JSON values saved with it.

    Returns None, and leaves the model alone, if the entry is missing in any process.
    """
    with processes.raise_on_all_ranks():
        entry = journal.load(name, shared=True)
    entry = processes.all_or_none(entry)
    if entry is None:
        return None
    by_name = {target.name: target for target in targets}
    members: Mapping[str, Sequence[str]] = entry.values.get("members", {})
    by_name |= {joint: joint_target([by_name[part] for part in parts]) for joint, parts in members.items()}
    layers = parse_rank_map(entry.values["layers"])
    for layer, described in layers.items():
        prefix, target = f"{layer}.", by_name[layer]
        state = {key.removeprefix(prefix): value for key, value in entry.tensors.items() if key.startswith(prefix)}
        insert_layer(model, target, layer_from_state(state, target.module, described), described.chunks)
    for key, tensor in values_beside(model, [each.name for layer in layers for each in by_name[layer].layers]).items():
        if key in entry.tensors:
            tensor.copy_(entry.tensors[key])
    return entry.values
