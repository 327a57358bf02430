"""Finished compensation work in the journal: factored layers, and all other values that have changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..checkpoint.factorize import layer_from_state, values_beside
from ..checkpoint.modeling import FactoredLinear, replace_module
from ..checkpoint.names import Target
from ..checkpoint.rank_map import parse_rank_map
from ..runtime.distributed import Processes
from ..runtime.journal import Journal
from .compensator import CompensationResult, CompensationTask


_NAME = "compensated"


def save_steps(task: CompensationTask, results: Sequence[CompensationResult]) -> None:
    """Save the model after the steps finished so far, and their results."""
    if not task.journal.is_kept:
        return
    layers = [name for name, module in task.model.named_modules() if isinstance(module, FactoredLinear)]
    values = {"results": [dataclasses.asdict(result) for result in results]}
    with task.processes.raise_on_all_ranks():
        save_layers(task.journal, _NAME, task.model, layers, values, other=True)


def resume_steps(task: CompensationTask) -> list[CompensationResult]:
    """Restore the model as saved after the last finished step, and return the results of the finished steps."""
    values = load_layers(task.journal, _NAME, task.model, task.targets, task.processes)
    return [] if values is None else [CompensationResult(**result) for result in values["results"]]


def save_layers(
    journal: Journal,
    name: str,
    model: nn.Module,
    layers: Iterable[str],
    values: Mapping[str, Any],
    other: bool = False,
) -> None:
    """Save factored layers, given by module name, and JSON values as a journal entry that all processes share.

    With `other`, all other parameters and buffers of the model are saved too.
    """
    modules = {layer: cast(FactoredLinear, model.get_submodule(layer)) for layer in layers}
    entries = {layer: module.entry.to_dict() for layer, module in modules.items()}
    # The `weight` of a factored layer is an empty placeholder.
    tensors = {
        f"{layer}.{key}": tensor
        for layer, module in modules.items()
        for key, tensor in module.state_dict().items()
        if tensor.numel()
    }
    if other:
        tensors.update(values_beside(model, modules))
    journal.save(name, tensors, {"layers": entries, **values}, shared=True)


@torch.no_grad()
def load_layers(
    journal: Journal, name: str, model: nn.Module, targets: Sequence[Target], processes: Processes
) -> Mapping[str, Any] | None:
    """Put what `save_layers` saved into a compressed model, and return the JSON values saved with it.

    Returns None, and leaves the model alone, if the entry is missing in any process.
    """
    with processes.raise_on_all_ranks():
        entry = journal.load(name, shared=True)
    if not all(processes.gather(entry is not None)) or entry is None:
        return None
    dense = {target.name: target.module for target in targets}
    layers = parse_rank_map(entry.values["layers"])
    for layer, described in layers.items():
        prefix = f"{layer}."
        names = [key.removeprefix(prefix) for key in entry.tensors if key.startswith(f"{prefix}factor_")]
        state = {name: entry.tensors[prefix + name] for name in names}
        replace_module(model, layer, layer_from_state(state, dense[layer], described))
    for key, tensor in values_beside(model, layers).items():
        if key in entry.tensors:
            tensor.copy_(entry.tensors[key])
    return entry.values
