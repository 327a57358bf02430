"""The stages of a compression that turn layers into factored layers: decompose, then factorize at the chosen ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .calibration.result import Calibration
from .decomposition import Decomposition, LayerStatistics, Metric, Statistic, balance, corrected_bias, pivot_rows
from .distributed import ALONE, Processes
from .freed import return_freed_memory
from .journal import NO_JOURNAL, Journal
from .layout import FactoredLayer, break_even, stored_values
from .loading import empty_layer
from .messages import get_logger
from .modeling import FactoredLinear, LowRankLinear, PivotedLinear, replace_module, to_float64
from .saved_decompositions import SavedDecompositions
from .targets import Target


logger = get_logger(__name__)

MAX_GROWTH = 8.0
"""Largest coefficient of the pivoted layout. Rounding errors of float16 and bfloat16 are enlarged by it."""


def check_weights(targets: Sequence[Target]) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: names the first layer whose weight is not.
    """
    for target in targets:
        if not torch.isfinite(target.module.weight).all():
            raise ValueError(f"The weight of layer {target.name!r} holds NaN or Inf; the checkpoint is damaged.")


def decompose_layers(
    metric: Metric,
    targets: Sequence[Target],
    calibration: Calibration | None,
    layout: str = "factors",
    processes: Processes = ALONE,
    journal: Journal = NO_JOURNAL,
) -> dict[str, Decomposition]:
    """Decompose every layer, in float64.

    Kept are, by canonical name, the components that pay off (up to the break-even rank), in float32 or the layer's own
    precision if that is higher: at most as much memory as the dense weights in that precision. Several processes share
    the layers out by cost, and give each other what they have found.

    Args:
        metric: How errors are measured.
        targets: The layers.
        calibration: Statistics by module name; None for a metric without data.
        layout: How factors will be stored; it says where break-even is.
        processes: Those that share the work.
        journal: Where it is noted what takes long, and found when the run goes on.

    Raises:
        ValueError: if the calibration lacks a layer or a statistic.
    """
    owners = processes.share_out({target.name: math.prod(target.shape) * min(target.shape) for target in targets})
    own = [target for target in targets if owners[target.name] == processes.index]
    saved = SavedDecompositions(journal, {target.name: to_float64(target.module.weight[:0]).device for target in own})
    with processes.agreed():
        found = saved.load()
        for target in logging.tqdm(own, desc="Decomposing", unit="layer"):
            if target.name not in found:
                found[target.name] = _decompose(metric, target, calibration, layout)
                saved.add(target.name, found[target.name])
                return_freed_memory(target.module.weight.device)
        saved.finish()
    if processes.is_alone:
        return {target.canonical_name: found[target.name] for target in targets}
    decompositions = {}
    for target in targets:
        parts = vars(found[target.name]) if target.name in found else None
        device = to_float64(target.module.weight[:0]).device
        decompositions[target.canonical_name] = Decomposition(**processes.send(parts, owners[target.name], device))
    return decompositions


def _decompose(metric: Metric, target: Target, calibration: Calibration | None, layout: str) -> Decomposition:
    weight = to_float64(target.module.weight)
    statistics = None if calibration is None else _to(_statistics(calibration, target), weight)
    if statistics is not None and target.module.bias is None:
        statistics = statistics.about_zero(weight)
    decomposition = metric.decompose(weight, statistics)
    # From the break-even rank on a layer stays dense; no more components can be asked for.
    m, n = target.shape
    keep = max(1, int(break_even(m, n, layout)))
    dtype = torch.promote_types(target.module.weight.dtype, torch.float32)
    return decomposition.truncated(keep, dtype)


def allocation_losses(metric: Metric, decompositions: Mapping[str, Decomposition]) -> dict[str, np.ndarray]:
    """Loss at rank 0, 1, … of every layer, in the unit in which losses of different layers are added up."""
    return {
        name: (decomposition.tails() if metric.common_unit else decomposition.losses()).cpu().numpy()
        for name, decomposition in decompositions.items()
    }


def factorize_layers(
    model: nn.Module,
    targets: Sequence[Target],
    decompositions: MutableMapping[str, Decomposition],
    ranks: Mapping[str, int | None],
    calibration: Calibration | None,
    layout: str = "factors",
    processes: Processes = ALONE,
) -> dict[str, FactoredLayer]:
    """Replace the layers of `model` by factored ones of the given ranks; return the rank map.

    Several processes share the layers out, and all get the same ones.

    Args:
        model: Changed in place; `targets` may belong to it or to the model it is a copy of.
        targets: The layers.
        decompositions: By canonical name; those that this process has used are taken out, so that memory does not grow.
        ranks: By canonical name; None leaves a layer dense.
        calibration: Statistics by module name, for the bias; None leaves biases as they are.
        layout: How factors are stored; see `FactoredLayer`.
        processes: Those that share the work.
    """

    def factorize(target: Target) -> FactoredLinear:
        rank = ranks[target.canonical_name]
        assert rank is not None  # dense layers are left out below
        mean = None if calibration is None else _statistics(calibration, target).require(Statistic.INPUT_MEAN)
        A, B = decompositions.pop(target.canonical_name).factors(rank)
        return factored_linear(target.module, A, B, layout, mean)

    factored = [target for target in targets if ranks[target.canonical_name] is not None]
    for name, layer in make_layers(factored, factorize, processes, "Factorizing"):
        replace_module(model, name, layer)
    return rank_map_of(model, targets)


def make_layers(
    targets: Sequence[Target],
    make: Callable[[Target], FactoredLinear],
    processes: Processes = ALONE,
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
    owners = processes.share_out({target.name: math.prod(target.shape) * min(target.shape) for target in targets})
    own = logging.tqdm(
        [target for target in targets if owners[target.name] == processes.index],
        desc=description,
        unit="layer",
        disable=description is None,
    )
    if processes.is_alone:
        for target in own:
            yield target.name, make(target)
            return_freed_memory(target.module.weight.device)
        return
    with processes.agreed():
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
    if processes.is_alone:
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


def _statistics(calibration: Calibration, target: Target) -> LayerStatistics:
    if target.name not in calibration.layers:
        raise ValueError(
            f"The calibration holds no statistics of layer {target.name!r}; calibrate with the same target_modules and "
            "exclude_modules."
        )
    statistics = calibration.layers[target.name]
    m, n = target.shape
    expected = {
        Statistic.INPUT_MEAN: (n,),
        Statistic.INPUT_VARIANCE: (n,),
        Statistic.INPUT_COVARIANCE: (n, n),
        Statistic.OUTPUT_COVARIANCE: (m, m),
        Statistic.GRADIENT_MOMENT: (m, m),
        Statistic.INPUT_GRADIENT_MOMENT: (n, n),
        Statistic.GRADIENT_ENERGY: (),
    }
    for statistic, shape in expected.items():
        tensor = getattr(statistics, statistic.value)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"The calibration's {statistic.value} of layer {target.name!r} has the shape {list(tensor.shape)}; "
                f"{list(shape)} is needed. The file is damaged or belongs to another model; calibrate anew."
            )
    return statistics


def _to(statistics: LayerStatistics, tensor: torch.Tensor) -> LayerStatistics:
    moved = {
        statistic.value: value.to(tensor.device)
        for statistic in Statistic
        if (value := getattr(statistics, statistic.value)) is not None
    }
    return dataclasses.replace(statistics, **moved)
