"""Decompose the targeted layers, all at once or group by group, and factorize them at the allocated ranks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..calibration.result import Calibration
from ..calibration.task import CalibrationTask
from ..checkpoint.factorize import factored_linear, make_layers, rank_map_of
from ..checkpoint.modeling import FactoredLinear, replace_module
from ..checkpoint.names import Target
from ..checkpoint.rank_map import FactoredLayer, break_even
from ..decomposition import Decomposition, LayerStatistics, Metric, Statistic
from ..decomposition.statistics import GRADIENT_STATISTICS
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.malloc import trim_heap
from ..runtime.phases import phase
from ..runtime.precision import to_float64


def check_weights(targets: Sequence[Target]) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: if one is not; the message names the first such layer.
    """
    for target in targets:
        if not torch.isfinite(target.module.weight).all():
            raise ValueError(f"The weight of layer {target.name!r} holds NaN or Inf; the checkpoint is damaged.")


def decompose_layers(
    metric: Metric,
    targets: Sequence[Target],
    calibration: Calibration | None,
    layout: str = "factors",
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Decomposition]:
    """Decompose every layer in float64; return the decompositions by canonical name.

    Only components up to the break-even rank are kept, in float32 or the layer's own precision if that is higher, so
    that they take at most as much memory as the dense weights. Several processes share the layers and exchange results.

    Args:
        metric: Measures the error of a layer.
        targets: The layers.
        calibration: Statistics by module name; None for a metric that uses no data.
        layout: How factors will be stored, on which the break-even rank depends.
        processes: The processes that share the work.

    Raises:
        ValueError: if the calibration lacks a layer or a statistic.
    """
    owners = processes.balance_tasks({target.name: math.prod(target.shape) * min(target.shape) for target in targets})
    own = [target for target in targets if owners[target.name] == processes.index]
    found: dict[str, Decomposition] = {}
    with phase("Decomposed") as decomposing:
        with processes.raise_on_all_ranks():
            for target in logging.tqdm(own, desc="Decomposing", unit="layer"):
                found[target.name] = _decompose(metric, target, calibration, layout)
                trim_heap(target.module.weight.device)
        if not processes.is_single:
            for target in targets:
                parts = vars(found[target.name]) if target.name in found else None
                device = to_float64(target.module.weight[:0]).device
                found[target.name] = Decomposition(**processes.send(parts, owners[target.name], device))
        decomposing.add_detail(f"{len(targets)} layers")
    return {target.canonical_name: found[target.name] for target in targets}


def _decompose(metric: Metric, target: Target, calibration: Calibration | None, layout: str) -> Decomposition:
    weight = to_float64(target.module.weight)
    statistics = None if calibration is None else _to(_statistics(calibration, target), weight)
    if statistics is not None and target.module.bias is None:
        statistics = statistics.about_zero(weight)
    decomposition = metric.decompose(weight, statistics)
    # A layer stays dense from the break-even rank on, so that no further component is ever used.
    m, n = target.shape
    keep = max(1, int(break_even(m, n, layout)))
    dtype = torch.promote_types(target.module.weight.dtype, torch.float32)
    return decomposition.truncated(keep, dtype)


def allocation_losses(metric: Metric, decompositions: Mapping[str, Decomposition]) -> dict[str, np.ndarray]:
    """Return the loss of every layer at rank 0, 1, …, in a unit in which the losses of all layers can be added up."""
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
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, FactoredLayer]:
    """Replace the layers of `model` by factored ones of the given ranks; return the rank map.

    Several processes share the work, and all end up with the same layers.

    Args:
        model: Changed in place; `targets` may belong to it or to the model that it is a copy of.
        targets: The layers.
        decompositions: By canonical name; used ones are removed, so that memory does not grow.
        ranks: By canonical name; None leaves a layer dense.
        calibration: Statistics by module name, to correct biases; None leaves biases unchanged.
        layout: How factors are stored; see `FactoredLayer`.
        processes: The processes that share the work.
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


def _statistics(calibration: Calibration, target: Target) -> LayerStatistics:
    if target.name not in calibration.layers:
        raise ValueError(
            f"The calibration holds no statistics of layer {target.name!r}; calibrate with the same target_modules and "
            "exclude_modules."
        )
    statistics = calibration.layers[target.name]
    for statistic in Statistic:
        tensor = getattr(statistics, statistic.value)
        # The number of tokens per image is not known here.
        if tensor is not None and tensor.shape != (shape := statistic.shape(*target.shape, *tensor.shape[:1])):
            raise ValueError(
                f"The calibration's {statistic.value} of layer {target.name!r} has the shape {list(tensor.shape)}; "
                f"{list(shape)} is needed. The file is damaged or belongs to another model; calibrate again."
            )
    return statistics


def _to(statistics: LayerStatistics, tensor: torch.Tensor) -> LayerStatistics:
    moved = {
        statistic.value: value.to(tensor.device)
        for statistic in Statistic
        if (value := getattr(statistics, statistic.value)) is not None
    }
    return dataclasses.replace(statistics, **moved)


def decompose_by_groups(
    metric: Metric, groups: Sequence[Sequence[Target]], layout: str, task: CalibrationTask, keep_gradients: bool
) -> tuple[dict[str, Decomposition], Calibration, float]:
    """Calibrate and decompose group by group, so that only the statistics of one group are held at a time.

    Every group takes one pass over the images. With several groups, results are kept on the host.

    Args:
        metric: Measures the error of a layer.
        groups: The layers.
        layout: How factors will be stored.
        task: Collects the statistics.
        keep_gradients: Whether later steps need the Fisher information; means are always kept.

    Returns:
        The decompositions by canonical name, the statistics that later steps need, and the seconds spent decomposing.

    Raises:
        ValueError: as `CalibrationTask.collect_once` and `decompose_layers`.
    """
    decompositions: dict[str, Decomposition] = {}
    parts: list[Calibration] = []
    seconds = 0.0
    device = None if len(groups) == 1 else "cpu"
    for group in groups:
        part = task.collect_once(group)
        start = time.perf_counter()
        found = decompose_layers(metric, group, part, layout, task.processes)
        seconds += time.perf_counter() - start
        decompositions |= {name: each if device is None else each.to(device) for name, each in found.items()}
        kept = GRADIENT_STATISTICS if keep_gradients else frozenset()
        layers = {name: statistics.only(kept, device) for name, statistics in part.layers.items()}
        parts.append(dataclasses.replace(part, layers=layers))
        # Free their memory before the next pass.
        del part, found, layers
    together = dataclasses.replace(
        parts[0],
        layers={name: statistics for part in parts for name, statistics in part.layers.items()},
        seconds=sum(part.seconds for part in parts),
    )
    return decompositions, together, seconds
