"""Make factored layers: from factors, from stored values, and the same ones in all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from transformers.utils import logging

from ..decomposition import balance, corrected_bias, pivot_rows
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.logging import get_logger
from ..runtime.malloc import trim_heap
from ..runtime.precision import to_float64
from .loading import empty_layer
from .modeling import FactoredLinear, LowRankLinear, PivotedLinear, replace_module
from .names import Target
from .rank_map import FactoredLayer, stored_values


logger = get_logger(__name__)

MAX_GROWTH = 8.0
"""Largest coefficient of the pivoted layout. Rounding errors of float16 and bfloat16 are enlarged by it."""


def make_layers(
    targets: Sequence[Target],
    make: Callable[[Target], FactoredLinear],
    processes: Processes = SINGLE_PROCESS,
    description: str | None = None,
) -> Iterator[tuple[str, FactoredLinear]]:
    """Make factored layers, by module name; several processes share them out by cost, and all get the very same ones.

    A process that is alone gives each away before it makes the next: the dense layers of a copy go as they are replaced.

    Args:
        targets: The dense layers whose place they take.
        make: Makes one.
        processes: Those that share the work.
        description: Of the progress bar; None shows none.
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


def _share_layer(layer: FactoredLinear | None, dense: nn.Linear, processes: Processes, source: int) -> FactoredLinear:
    """The layer that one process has made, on all."""
    entry = processes.broadcast(None if layer is None else layer.entry, source)
    tensors = processes.send(None if layer is None else layer.state_dict(), source, dense.weight.device)
    if layer is not None:
        return layer
    assert entry is not None  # `source` has made the layer
    return layer_from_state(tensors, dense, entry)


def layer_from_state(state: Mapping[str, torch.Tensor], dense: nn.Linear, entry: FactoredLayer) -> FactoredLinear:
    """A factored layer from its values.

    Args:
        state: Of its state dict; the empty `weight` may be left out.
        dense: The layer whose place it takes.
        entry: Of the rank map.
    """
    layer = empty_layer(dense, entry)
    state = {name: tensor.to(dense.weight.device) for name, tensor in state.items()}
    layer.load_state_dict({"weight": dense.weight.new_empty(0), **state}, assign=True)
    for parameter in (*layer.factor_a.parameters(), *layer.factor_b.parameters()):
        parameter.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


@torch.no_grad()
def share_model(model: nn.Module, targets: Sequence[Target], processes: Processes) -> None:
    """Give the compressed model of the main process to all: layers that may have new pivots, and all other values."""
    if processes.is_single:
        return
    factored = {
        target.name: target.module for target in targets if target.canonical_name in rank_map_of(model, targets)
    }
    for name, dense in factored.items():
        layer = cast(FactoredLinear, model.get_submodule(name))
        replace_module(model, name, _share_layer(layer if processes.is_main else None, dense, processes, 0))
    values = values_beside(model, factored)
    for name, tensor in processes.send(values, 0).items():
        values[name].copy_(tensor)


def values_beside(model: nn.Module, layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model, but for those of some layers, by name; they are the model's own."""
    prefixes = tuple(f"{layer}." for layer in layers)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}


def rank_map_of(model: nn.Module, targets: Sequence[Target]) -> dict[str, FactoredLayer]:
    """The factored layers of a compressed model as they are now, by canonical name.

    Args:
        model: The compressed model.
        targets: The targeted layers of the original.
    """
    modules = {target.canonical_name: model.get_submodule(target.name) for target in targets}
    return {name: module.entry for name, module in modules.items() if isinstance(module, FactoredLinear)}


def factored_linear(
    dense: nn.Linear, A: torch.Tensor, B: torch.Tensor, layout: str, mean: torch.Tensor | None = None
) -> FactoredLinear:
    """The factored layer that takes the place of a dense one.

    Args:
        dense: The layer; it gives bias, dtype, device, trainability and mode.
        A: `[rank, in_features]`, float64.
        B: `[out_features, rank]`, float64.
        layout: How to store the factors. Where the pivoted layout would need coefficients above `MAX_GROWTH`, which no
            choice of rows should, the leading components of the product are stored as plain factors in as many values.
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
    for parameter in (*layer.factor_a.parameters(), *layer.factor_b.parameters()):
        parameter.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def warn_of_other_layouts(rank_map: Mapping[str, FactoredLayer], layout: str) -> None:
    """Name the layers that `factored_linear` has stored otherwise than asked for."""
    others = {name: entry.rank for name, entry in rank_map.items() if entry.layout != layout}
    if others:
        listed = ", ".join(f"{name} (rank {rank})" for name, rank in others.items())
        logger.warning(
            f"Stored as plain factors of a lower rank, within the budget, since layout={layout!r} would need coefficients "
            f"above {MAX_GROWTH:g}: {listed}."
        )
