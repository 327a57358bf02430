"""Outcomes of compensation steps in the journal: the layers that a step has made, and all values that it has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoint.factorize import layer_from_state, values_beside
from ..checkpoint.modeling import FactoredLinear, replace_module
from ..checkpoint.names import Target
from ..checkpoint.rank_map import parse_rank_map
from ..runtime.distributed import Processes
from ..runtime.journal import Entry, Journal
from .compensator import CompensationResult, CompensationTask


_NAME = "compensated"


def save_steps(task: CompensationTask, results: Sequence[CompensationResult]) -> None:
    """Note the model as the steps so far have left it, and what came of them."""
    if not task.journal.is_kept:
        return
    layers = [name for name, module in task.model.named_modules() if isinstance(module, FactoredLinear)]
    values = {"results": [dataclasses.asdict(result) for result in results]}
    with task.processes.raise_on_all_ranks():
        save_layers(task.journal, _NAME, task.model, layers, values, other=True)


def resume_steps(task: CompensationTask) -> list[CompensationResult]:
    """Put the model into the state in which the steps had left it that were finished before the run was cut off.

    Returns:
        What came of them.
    """
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
    """Save factored layers of a model that all processes have.

    Args:
        journal: Where to.
        name: Of the entry.
        model: The compressed model.
        layers: Module names of factored layers.
        values: JSON values to keep with them.
        other: Whether to save all other parameters and buffers too.
    """
    modules = {layer: cast(FactoredLinear, model.get_submodule(layer)) for layer in layers}
    entries = {layer: module.entry.to_dict() for layer, module in modules.items()}
    # A layer's empty `weight` is no content.
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
    """Put into a model what `save_layers` has saved.

    Args:
        journal: Where from.
        name: Of the entry.
        model: The compressed model, as it was before.
        targets: The targeted layers of the original.
        processes: Those that share the work: if one of them does not find the entry, none uses it.

    Returns:
        The JSON values kept with them, or None.
    """
    with processes.raise_on_all_ranks():
        entry = journal.load(name, shared=True)
    if not all(processes.gather(entry is not None)) or entry is None:
        return None
    dense = {target.name: target.module for target in targets}
    layers = parse_rank_map(entry.values["layers"])
    for layer, described in layers.items():
        replace_module(model, layer, layer_from_state(_state(entry, layer), dense[layer], described))
    for key, tensor in values_beside(model, layers).items():
        if key in entry.tensors:
            tensor.copy_(entry.tensors[key])
    return entry.values


def _state(entry: Entry, layer: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{layer}."): tensor
        for key, tensor in entry.tensors.items()
        if key.startswith(f"{layer}.factor_")
    }
