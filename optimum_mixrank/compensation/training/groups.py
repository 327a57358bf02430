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
from ...runtime.inputs import ModelInputs
from ...runtime.outputs import PLAIN_CALL, ModelCall
from ...runtime.precision import to_float64
from .whitening import Roots, whitened_balance


INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.1

NUM_IMAGES = 256
"""Number of images from which the coordinates are computed: they only steer the steps."""

VECTOR_SCALE = 0.125
"""Relative step size of biases and normalizations, whose values are of the order of 1."""

Group = dict[str, Any]


def factor_groups(
    model: nn.Module,
    names: Sequence[str],
    images: ModelInputs,
    batch_size: int,
    seed: int,
    processes: Processes = SINGLE_PROCESS,
    call: ModelCall = PLAIN_CALL,
) -> dict[str, list[Group]]:
    """Balance the factors of layers in whitened coordinates, and return their groups for `WhitenedAdam`.

    Takes a forward and a backward pass over some of the images. Memory per layer: three float64 matrices of the size of
    its input and its output during the passes, one in float32 afterwards. Several processes get the same groups.

    Args:
        model: The compressed model, whose factored layers are all `LowRankLinear`.
        names: Module names of these layers.
        images: Inputs for any number of images; the same in all processes.
        batch_size: Batch size of the passes.
        seed: Seed of the choice of images and of the Fisher probes.
        processes: The processes that share the work.
        call: How the model is called, and for which of its outputs gradients are computed.

    Returns:
        Two groups for each layer, with `params`, `left` or `right`, and `scale`, the size of the factors' entries, by
        which steps are multiplied.

    Raises:
        ValueError: if a layer is not called, or NaN or Inf occur.
    """
    statistics = _statistics(model, names, images, batch_size, seed, processes, call)
    # Layers with the same input share its statistics and hence its roots.
    sharing: dict[int, list[str]] = {}
    for name in names:
        sharing.setdefault(id(statistics[name].input_covariance), []).append(name)
    layers = {name: model.get_submodule(name) for name in names}
    # The cost of the eigendecompositions.
    cubes = {name: float(layer.in_features**3 + layer.out_features**3) for name, layer in layers.items()}
    costs = {same[0]: sum(cubes[name] for name in same) for same in sharing.values()}
    owners = processes.balance_tasks(costs)
    own: dict[str, dict[str, Tensor]] = {}
    with processes.raise_on_all_ranks():
        for same in sharing.values():
            if owners[same[0]] == processes.index:
                own[same[0]] = _coordinates(model, same, statistics)
    groups: dict[str, list[Group]] = {}
    for same in sharing.values():
        tensors = processes.send(own.get(same[0]), owners[same[0]], layers[same[0]].factor_a.weight.device)
        groups.update({name: _groups(layers[name], name, tensors) for name in same})
    return {name: groups[name] for name in names}


def _statistics(
    model: nn.Module,
    names: Sequence[str],
    images: ModelInputs,
    batch_size: int,
    seed: int,
    processes: Processes,
    call: ModelCall,
) -> Mapping[str, LayerStatistics]:
    """Return the input covariances and gradient moments of layers, from images drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(len(images), generator=generator)[:NUM_IMAGES]]
    kinds = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.GRADIENT_MOMENT})
    parts = enumerate(chosen.split(batch_size))
    batches = [Batch(part, index=index) for index, part in parts if processes.owns(index)]
    required = dict.fromkeys(names, kinds)
    return collect_statistics(model, batches, required, len(chosen), seed=seed, processes=processes, call=call)[0]


def _coordinates(
    model: nn.Module, names: Sequence[str], statistics: Mapping[str, LayerStatistics]
) -> dict[str, Tensor]:
    """Return the coordinates and balanced factors of layers that share an input, in the dtype of their factors."""
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


@torch.no_grad()
def _groups(layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> list[Group]:
    """Give a layer its balanced factors, and return their groups."""
    A, B, scale = layer.factor_a.weight, layer.factor_b.weight, float(tensors[f"{name}.scale"])
    A.copy_(tensors[f"{name}.A"])
    B.copy_(tensors[f"{name}.B"])
    return [
        {"params": [A], "right": tensors["right"], "scale": scale},
        {"params": [B], "left": tensors[f"{name}.left"], "scale": scale},
    ]


def vector_group(model: nn.Module, names: Sequence[str], scope: nn.Module) -> Group:
    """Return a group of the biases of layers and of all parameters of the normalizations within `scope`."""
    biases = [model.get_submodule(name).bias for name in names]
    modules = [module for module in scope.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    parameters = [bias for bias in biases if bias is not None]
    parameters += [parameter for module in modules for parameter in module.parameters() if parameter.numel()]
    return {"params": list(dict.fromkeys(parameters)), "scale": VECTOR_SCALE}
