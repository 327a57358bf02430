"""Parameter groups for training a compressed model in whitened coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.collect import collect_statistics
from ..calibration.images import Batch
from ..decomposition import Statistic
from ..modeling import to_float64
from .whitening import Roots, whitened_balance


INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.1
NUM_IMAGES = 256
"""Images from which the coordinates are taken: they steer steps, no solution hangs on them."""

VECTOR_SCALE = 0.125
"""Steps of biases and normalizations, whose values are of the order of 1, beside those of factors."""

Group = dict[str, Any]


def factor_groups(
    model: nn.Module, names: Sequence[str], images: Tensor, batch_size: int, seed: int
) -> dict[str, list[Group]]:
    """Groups of `WhitenedAdam` for the factors of layers, which are balanced anew in the coordinates of their groups.

    Takes one forward and one backward pass over some of the images. Memory: three float64 matrices of the size of its
    input and its output for every layer while they are collected, one of float32 afterwards.

    Args:
        model: The compressed model, its layers as `LowRankLinear`.
        names: Module names of these layers.
        images: `[images, channels, height, width]`.
        batch_size: Of these passes.
        seed: Of the draw of images and of the Fisher probes.

    Returns:
        Two groups by layer, with `params`, `left` or `right`, and `scale`: steps are relative to the factors' size.

    Raises:
        ValueError: if a layer is not called, or NaN or Inf occur.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:NUM_IMAGES]]
    wanted = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.GRADIENT_MOMENT})
    batches = [Batch(part, index=index) for index, part in enumerate(chosen.split(batch_size))]
    statistics, _ = collect_statistics(model, batches, dict.fromkeys(names, wanted), seed=seed)
    groups: dict[str, list[Group]] = {}
    inputs: dict[int, tuple[Roots, Tensor]] = {}
    for name in names:
        layer = model.get_submodule(name)
        # Layers with the same input share its statistics and hence its roots.
        key = id(statistics[name].input_covariance)
        found = statistics[name].about_zero(to_float64(layer.product()))
        if key not in inputs:
            roots = Roots.of(found.require(Statistic.INPUT_COVARIANCE), INPUT_DAMPING)
            inputs[key] = roots, roots.inverse.to(layer.factor_a.weight)
        roots, right = inputs[key]
        outputs = Roots.of(found.require(Statistic.GRADIENT_MOMENT), OUTPUT_DAMPING)
        weights = layer.factor_a.weight, layer.factor_b.weight
        A, B, scale = whitened_balance(to_float64(weights[0]), to_float64(weights[1]), roots, outputs)
        with torch.no_grad():
            for weight, value in zip(weights, (A, B), strict=True):
                weight.copy_(value)
        groups[name] = [
            {"params": [weights[0]], "right": right, "scale": scale},
            {"params": [weights[1]], "left": outputs.inverse.to(weights[1]), "scale": scale},
        ]
    return groups


def vector_group(model: nn.Module, names: Sequence[str], scope: nn.Module) -> Group:
    """The biases of layers, and weights and biases of the normalizations within `scope`."""
    biases = [model.get_submodule(name).bias for name in names]
    modules = [module for module in scope.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    parameters = [bias for bias in biases if bias is not None]
    parameters += [parameter for module in modules for parameter in module.parameters() if parameter.numel()]
    return {"params": list(dict.fromkeys(parameters)), "scale": VECTOR_SCALE}
