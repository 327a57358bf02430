"""Make factored layers, from factors or from saved tensors, and share them between processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from transformers.utils import logging

from ..decomposition import balance, corrected_bias, pivot_rows
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.logging import get_logger
from ..runtime.malloc import trim_heap
from ..runtime.precision import to_float64
from .entries import entry_of, is_compressed
from .loading import empty_layer
from .modeling import FactoredLinear, LowRankLinear, replace_module
from .names import Target, joint_target
from .narrowing import divided, mark_narrow, narrow_from, stacked
from .pivoted import PivotedLinear
from .rank_map import DENSE, FactoredLayer, stored_values
from .shared import SharedLinear, member_sizes, share


logger = get_logger(__name__)

Layer = TypeVar("Layer", bound=nn.Module)

MAX_GROWTH = 8.0
"""Largest coefficient of the pivoted layout, by which it magnifies the rounding errors of float16 and bfloat16."""


def factored_linear(
    dense: nn.Linear, A: torch.Tensor, B: torch.Tensor, layout: str, mean: torch.Tensor | None = None
) -> FactoredLinear:
    """Return the factored layer that replaces a dense one.

    Args:
        dense: The layer, which determines bias, dtype, device, trainability and mode.
        A: `[rank, in_features]`, float64.
        B: `[out_features, rank]`, float64.
        layout: How to store the factors. Where the pivoted layout would need coefficients above `MAX_GROWTH`, which a
            good choice of rows avoids, the leading components are stored as plain factors in as many values.
        mean: Mean of the inputs, `[in_features]`, that the bias is corrected for; None leaves the bias as it is. A
            layer without bias does not get one: the dense model that it may become again has no place for it.
    """
    pivoting = pivot_rows(A, B) if layout == "pivoted" else None
    if pivoting is not None and pivoting.growth > MAX_GROWTH:
        (rank, n), m = A.shape, len(B)
        fewer = max(1, stored_values(m, n, rank, layout) // (m + n))
        A, B = balance(A, B)
        A, B, pivoting = A[:fewer], B[:, :fewer], None
    layer: FactoredLinear
    if pivoting is not None:
        pivots, A, C = pivoting
        layer = PivotedLinear.from_pivots(
            A.to(dense.weight), C.to(dense.weight), pivots.to(dense.weight.device), dense.bias
        )
    else:
        layer = LowRankLinear.from_factors(A.to(dense.weight), B.to(dense.weight), dense.bias)
    if mean is not None and dense.bias is not None:
        # From the factors as they are stored, so that the bias absorbs the mean of their rounding too.
        layer.set_bias(corrected_bias(to_float64(dense.weight), dense.bias, layer.product(), mean))
    return _with_mode_of(dense, layer)


def warn_of_other_layouts(rank_map: Mapping[str, FactoredLayer], layout: str) -> None:
    """Name the layers that `factored_linear` could not store in the layout that was asked for."""
    others = {name: entry.rank for name, entry in rank_map.items() if entry.layout not in (layout, DENSE)}
    if others:
        listed = ", ".join(f"{name} (rank {rank})" for name, rank in others.items())
        logger.warning(
            f"Stored as plain factors of a lower rank, within the budget, because layout={layout!r} would need "
            f"coefficients above {MAX_GROWTH:g}: {listed}."
        )


def insert_layer(model: nn.Module, target: Target, layer: nn.Module, chunks: int = 1) -> None:
    """Put a layer in the place of a target; in those of its members, if it is a joint one.

    Args:
        model: Changed in place.
        target: The original layer, or a joint one.
        layer: A factored layer or a dense one, perhaps with fewer outputs than the original. Of a joint target, the members
            share a factored layer, and each of them gets its rows of a dense one.
        chunks: Number of stacked parts of the outputs of a single target that have lost the same units.
    """
    if not target.members:
        _put(model, target, layer, chunks)
        return
    assert isinstance(layer, FactoredLinear | nn.Linear)  # nothing else takes the place of several layers
    sizes = member_sizes(layer.out_features, [member.module.out_features for member in target.members])
    parts: Sequence[nn.Module]
    if isinstance(layer, FactoredLinear):
        parts = share(layer, sizes, [member.canonical_name for member in target.members])
    else:
        parts = divided(layer, sizes)
    for member, part in zip(target.members, parts, strict=True):
        _put(model, member, part, 1)


def _put(model: nn.Module, target: Target, layer: nn.Module, chunks: int) -> None:
    if (layer.out_features, layer.in_features) != target.shape and narrow_from(layer) is None:
        mark_narrow(layer, target.shape, chunks)
    replace_module(model, target.name, layer)


def layer_of(model: nn.Module, target: Target) -> FactoredLinear | nn.Linear:
    """Return the layer in the place of a target; of a joint one, what its members share, or all of them stacked."""
    layers = [model.get_submodule(layer.name) for layer in target.layers]
    if isinstance(layers[0], SharedLinear):
        return layers[0].factored
    if not target.members:
        assert isinstance(layers[0], FactoredLinear | nn.Linear)  # nothing else takes the place of a layer
        return layers[0]
    return stacked(layers)


def layer_from_state(
    state: Mapping[str, torch.Tensor], dense: nn.Linear, entry: FactoredLayer
) -> FactoredLinear | nn.Linear:
    """Return the layer with a given state dict, which may lack an empty `weight`, in place of a dense layer."""
    layer = empty_layer(dense, entry)
    state = {name: tensor.to(dense.weight.device) for name, tensor in state.items()}
    layer.load_state_dict({"weight": dense.weight.new_empty(0), **state}, assign=True)
    return _with_mode_of(dense, layer)


def _with_mode_of(dense: nn.Linear, layer: Layer) -> Layer:
    for parameter in layer.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def make_layers(
    targets: Sequence[Target],
    make: Callable[[Target], FactoredLinear | nn.Linear],
    processes: Processes = SINGLE_PROCESS,
    description: str | None = None,
) -> Iterator[tuple[str, FactoredLinear | nn.Linear]]:
    """Make factored layers, or dense ones with fewer units, and yield them by the names of their targets.

    Several processes divide the layers by cost, and all yield the very same ones. A single process yields each layer
    before it makes the next, so that the dense layers of a copied model can be freed one by one.

    Args:
        targets: The dense layers to replace.
        make: Returns the layer for one of them.
        processes: The processes that share the work.
        description: Title of the progress bar; None shows none.
    """
    owners = processes.balance_tasks({target.name: math.prod(target.shape) * min(target.shape) for target in targets})
    own = logging.tqdm(
        [target for target in targets if owners[target.name] == processes.index],
        desc=description,
        unit="layer",
        disable=description is None,
    )
    if processes.is_single:
        for target in own:
            yield target.name, make(target)
            trim_heap(target.module.weight.device)
        return
    with processes.raise_on_all_ranks():
        made = {target.name: make(target) for target in own}
    for target in targets:
        yield target.name, _share_layer(made.pop(target.name, None), target.module, processes, owners[target.name])


def _share_layer(
    layer: FactoredLinear | nn.Linear | None, dense: nn.Linear, processes: Processes, source: int
) -> FactoredLinear | nn.Linear:
    """Return the layer that the process `source` has made; the other processes pass None."""
    entry = processes.broadcast(None if layer is None else entry_within(layer, dense), source)
    tensors = processes.send(None if layer is None else layer.state_dict(), source, dense.weight.device)
    if layer is not None:
        return layer
    assert entry is not None  # `source` has made the layer
    return layer_from_state(tensors, dense, entry)


@torch.no_grad()
def share_model(model: nn.Module, targets: Sequence[Target], processes: Processes) -> None:
    """Copy the compressed model of the main process to the others: its layers, whose pivots may differ, and the rest."""
    if processes.is_single:
        return
    factored = changed_layers(model, targets)
    for target in factored:
        present = layer_of(model, target)
        narrow = narrow_from(present)
        shared = _share_layer(present if processes.is_main else None, target.module, processes, 0)
        insert_layer(model, target, shared, 1 if narrow is None else narrow[1])
    values = values_beside(model, [layer.name for target in factored for layer in target.layers])
    for name, tensor in processes.send(values, 0).items():
        values[name].copy_(tensor)


def values_beside(model: nn.Module, layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, not copied, except those of the named layers."""
    prefixes = tuple(f"{layer}." for layer in layers)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}


def rank_map_of(model: nn.Module, targets: Sequence[Target]) -> dict[str, FactoredLayer]:
    """Return the present rank map of a compressed model, given the targeted layers of the original."""
    modules = {target: model.get_submodule(target.name) for target in targets}
    return {target.canonical_name: entry_of(module) for target, module in modules.items() if is_compressed(module)}


def entry_within(layer: FactoredLinear | nn.Linear, dense: nn.Linear) -> FactoredLayer:
    """Return the entry of a layer that has not been put in its place yet, relative to the original."""
    shape, dense_shape = (layer.out_features, layer.in_features), (dense.out_features, dense.in_features)
    entry = entry_of(layer)
    return entry if shape == dense_shape else replace(entry, shape=shape, dense_shape=dense_shape)


def changed_layers(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Return the original layers that are factored or have lost units; those that share a factor as one joint target."""
    by_name = {target.canonical_name: target for target in targets}
    found: dict[str, Target] = {}
    for target in targets:
        module = model.get_submodule(target.name)
        if isinstance(module, SharedLinear):
            joint = joint_target([by_name[name] for name in module.members])
            found.setdefault(joint.name, joint)
        elif is_compressed(module):
            found[target.name] = target
    return list(found.values())
