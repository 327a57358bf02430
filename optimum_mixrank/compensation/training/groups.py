"""Parameter groups for training a compressed model in whitened coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.collect import collect_statistics
from ...calibration.images.batches import Batch
from ...decomposition import LayerStatistics, Statistic
from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.precision import to_float64
from .whitening import Roots, whitened_balance


INPUT_DAMPING = 0.01

OUTPUT_DAMPING = 0.1

NUM_IMAGES = 256
"""Images from which the coordinates are taken: they steer steps, no solution hangs on them."""

VECTOR_SCALE = 0.125
"""Steps of biases and normalizations, whose values are of the order of 1, beside those of factors."""

Group = dict[str, Any]


def factor_groups(
    model: nn.Module,
    names: Sequence[str],
    images: Tensor,
    batch_size: int,
    seed: int,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, list[Group]]:
    """Groups of `WhitenedAdam` for the factors of layers, which are balanced anew in the coordinates of their groups.

    Takes one forward and one backward pass over some of the images. Memory: three float64 matrices of the size of its
    input and its output for every layer while they are collected, one of float32 afterwards. Several processes share
    images and layers out, and all get the same.

    Args:
        model: The compressed model, its layers as `LowRankLinear`.
        names: Module names of these layers.
        images: `[images, channels, height, width]`; the same in all processes.
        batch_size: Of these passes.
        seed: Of the draw of images and of the Fisher probes.
        processes: Those that share the work.

    Returns:
        Two groups by layer, with `params`, `left` or `right`, and `scale`: steps are relative to the factors' size.

    Raises:
        ValueError: if a layer is not called, or NaN or Inf occur.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:NUM_IMAGES]]
    wanted = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.GRADIENT_MOMENT})
    batches = [
        Batch(part, index=index) for index, part in enumerate(chosen.split(batch_size)) if processes.owns(index)
    ]
    statistics, _ = collect_statistics(
        model, batches, dict.fromkeys(names, wanted), len(chosen), seed=seed, processes=processes
    )
    # Layers with the same input share its statistics and hence its roots.
    sharing: dict[int, list[str]] = {}
    for name in names:
        sharing.setdefault(id(statistics[name].input_covariance), []).append(name)
    costs = {same[0]: float(sum(_cost(model.get_submodule(name)) for name in same)) for same in sharing.values()}
    owners = processes.balance_tasks(costs)
    found: dict[str, dict[str, Tensor]] = {}
    with processes.raise_on_all_ranks():
        for same in sharing.values():
            if owners[same[0]] == processes.index:
                found[same[0]] = _coordinates(model, same, statistics)
    groups: dict[str, list[Group]] = {}
    for same in sharing.values():
        device = model.get_submodule(same[0]).factor_a.weight.device
        tensors = processes.send(found.get(same[0]), owners[same[0]], device)
        for name in same:
            layer = model.get_submodule(name)
            weights, scale = (layer.factor_a.weight, layer.factor_b.weight), float(tensors[f"{name}.scale"])
            with torch.no_grad():
                for weight, factor in zip(weights, "AB", strict=True):
                    weight.copy_(tensors[f"{name}.{factor}"])
            groups[name] = [
                {"params": [weights[0]], "right": tensors["right"], "scale": scale},
                {"params": [weights[1]], "left": tensors[f"{name}.left"], "scale": scale},
            ]
    return {name: groups[name] for name in names}


def _cost(layer: nn.Module) -> int:
    """Of the eigendecompositions."""
    return int(layer.in_features**3 + layer.out_features**3)


def _coordinates(
    model: nn.Module, names: Sequence[str], statistics: Mapping[str, LayerStatistics]
) -> dict[str, Tensor]:
    """Coordinates and balanced factors of layers that share an input, in the dtype of their factors."""
    tensors: dict[str, Tensor] = {}
    inputs: Roots | None = None
    for name in names:
        layer = model.get_submodule(name)
        A, B = layer.factor_a.weight, layer.factor_b.weight
        found = statistics[name].about_zero(to_float64(layer.product()))
        if inputs is None:
            inputs = Roots.of(found.require(Statistic.INPUT_COVARIANCE), INPUT_DAMPING)
            tensors["right"] = inputs.inverse.to(A)
        outputs = Roots.of(found.require(Statistic.GRADIENT_MOMENT), OUTPUT_DAMPING)
        balanced_A, balanced_B, scale = whitened_balance(to_float64(A), to_float64(B), inputs, outputs)
        tensors[f"{name}.left"] = outputs.inverse.to(B)
        tensors[f"{name}.A"], tensors[f"{name}.B"] = balanced_A.to(A), balanced_B.to(B)
        tensors[f"{name}.scale"] = torch.tensor(scale, dtype=torch.float64)
    return tensors


def vector_group(model: nn.Module, names: Sequence[str], scope: nn.Module) -> Group:
    """The biases of layers, and weights and biases of the normalizations within `scope`."""
    biases = [model.get_submodule(name).bias for name in names]
    modules = [module for module in scope.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    parameters = [bias for bias in biases if bias is not None]
    parameters += [parameter for module in modules for parameter in module.parameters() if parameter.numel()]
    return {"params": list(dict.fromkeys(parameters)), "scale": VECTOR_SCALE}
