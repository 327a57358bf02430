"""The stages of a compression that turn layers into factored layers: decompose, then factorize at the chosen ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.utils import logging

from .calibration.result import Calibration
from .decomposition import Decomposition, LayerStatistics, Metric, Statistic, corrected_bias
from .layout import FactoredLayer
from .modeling import LowRankLinear, replace_module
from .targets import Target


def check_weights(targets: Sequence[Target]) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: names the first layer whose weight is not.
    """
    for target in targets:
        if not torch.isfinite(target.module.weight).all():
            raise ValueError(f"The weight of layer {target.name!r} holds NaN or Inf; the checkpoint is damaged.")


def decompose_layers(
    metric: Metric, targets: Sequence[Target], calibration: Calibration | None
) -> dict[str, Decomposition]:
    """Decompose every layer, in float64.

    Kept are, by canonical name, the components that pay off (up to the break-even rank), in float32 or the layer's own
    precision if that is higher: at most as much memory as the dense weights in that precision.

    Args:
        metric: How errors are measured.
        targets: The layers.
        calibration: Statistics by module name; None for a metric without data.

    Raises:
        ValueError: if the calibration lacks a layer or a statistic.
    """
    decompositions = {}
    for target in logging.tqdm(targets, desc="Decomposing", unit="layer"):
        weight = _float64(target.module.weight)
        statistics = None if calibration is None else _to(_statistics(calibration, target), weight)
        if statistics is not None and target.module.bias is None:
            statistics = statistics.about_zero(weight)
        decomposition = metric.decompose(weight, statistics)
        m, n = target.shape
        # From the break-even rank on a layer stays dense; no more components can be asked for.
        keep = max(1, m * n // (m + n))
        dtype = torch.promote_types(target.module.weight.dtype, torch.float32)
        decompositions[target.canonical_name] = decomposition.truncated(keep, dtype)
    return decompositions


def factorize_layers(
    model: nn.Module,
    targets: Sequence[Target],
    decompositions: Mapping[str, Decomposition],
    ranks: Mapping[str, int | None],
    calibration: Calibration | None,
) -> dict[str, FactoredLayer]:
    """Replace the layers of `model` by factored ones of the given ranks; return the rank map.

    Args:
        model: Changed in place; `targets` may belong to it or to the model it is a copy of.
        targets: The layers.
        decompositions: By canonical name.
        ranks: By canonical name; None leaves a layer dense.
        calibration: Statistics by module name, for the bias; None leaves biases as they are.
    """
    rank_map = {}
    for target in logging.tqdm(targets, desc="Factorizing", unit="layer"):
        rank = ranks[target.canonical_name]
        if rank is None:
            continue
        mean = None
        # A layer without bias does not get one: the dense model that it may become again has no place for it.
        if calibration is not None and target.module.bias is not None:
            mean = _statistics(calibration, target).require(Statistic.INPUT_MEAN)
        layer = _factored(target.module, decompositions[target.canonical_name], rank, mean)
        replace_module(model, target.name, layer)
        rank_map[target.canonical_name] = FactoredLayer(rank, layer.bias is not None)
    return rank_map


def _factored(dense: nn.Linear, decomposition: Decomposition, rank: int, mean: torch.Tensor | None) -> LowRankLinear:
    A, B = (factor.to(dense.weight) for factor in decomposition.factors(rank))
    bias = dense.bias
    if mean is not None:
        weight = _float64(dense.weight)
        # From the factors as they are stored, so that the bias absorbs the mean of their rounding too.
        bias = corrected_bias(weight, bias.detach().to(weight), A.to(weight), B.to(weight), mean.to(weight)).to(
            dense.weight
        )
    layer = LowRankLinear.from_factors(A, B, bias)
    for parameter in (*layer.factor_a.parameters(), *layer.factor_b.parameters()):
        parameter.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def _statistics(calibration: Calibration, target: Target) -> LayerStatistics:
    if target.name not in calibration.layers:
        raise ValueError(
            f"The calibration holds no statistics of layer {target.name!r}; calibrate with the same target_modules and "
            "exclude_modules."
        )
    return calibration.layers[target.name]


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    # Apple's GPUs have no float64.
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _to(statistics: LayerStatistics, tensor: torch.Tensor) -> LayerStatistics:
    moved = {
        statistic.value: value.to(tensor.device)
        for statistic in Statistic
        if (value := getattr(statistics, statistic.value)) is not None
    }
    return dataclasses.replace(statistics, **moved)
