"""Collect the statistics of many layers while a model runs over calibration images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType

from torch import nn
from transformers.utils import logging

from ..decomposition.statistics import GRADIENT_STATISTICS, LayerStatistics, Statistic
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.forward import activation_gradients, evaluation_mode, placement
from ..runtime.logging import get_logger
from ..runtime.malloc import trim_heap
from ..runtime.outputs import PLAIN_CALL, ModelCall
from .collector import StatisticsCollector
from .fisher import GradientCollector
from .images.batches import Batch, ImageBatches


logger = get_logger(__name__)


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    required: Mapping[str, frozenset[Statistic]],
    num_images: int | None = None,
    *,
    fisher_samples: int = 1,
    seed: int = 42,
    processes: Processes = SINGLE_PROCESS,
    call: ModelCall = PLAIN_CALL,
    joints: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[dict[str, LayerStatistics], int]:
    """Run a model once over images, in evaluation mode, and collect statistics of its layers.

    The model is left as it was. Several processes each run over their own batches; all get the same statistics, which
    equal those of a single process over all batches up to rounding.

    Args:
        model: A model that takes the inputs of the batches.
        batches: Batches of images; with several processes, those of this process.
        required: Statistics to collect, by module name.
        num_images: Number of images in all processes, if known, for the progress bar.
        fisher_samples: Random probes per image for statistics of gradients; each costs a backward pass.
        seed: Seed of these probes.
        processes: The processes among which the batches are distributed.
        call: How the model is called, and for which of its outputs gradients are computed.
        joints: For names in `required` that stand for several layers with the same input, the module names of these.

    Returns:
        The statistics by module name, and the number of images seen. Layers of a joint one have its statistics, with their
        own part of its Fisher information.

    Raises:
        ValueError: if there is no image, a layer is never called, or NaN or Inf occur.
    """
    with_gradients = [name for name, statistics in required.items() if statistics & GRADIENT_STATISTICS]
    projected = [name for name in with_gradients if Statistic.GRADIENT_MOMENT not in required[name]]
    share = None if num_images is None else math.ceil(num_images / processes.count)
    gradients: GradientCollector | None = None
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        collector = stack.enter_context(StatisticsCollector(model, _of_modules(required, joints)))
        progress = stack.enter_context(logging.tqdm(total=share, desc="Calibrating", unit="img"))
        if with_gradients:
            gradients = stack.enter_context(
                GradientCollector(model, with_gradients, fisher_samples, seed, projected, joints)
            )
            stack.enter_context(activation_gradients(model))
        with processes.raise_on_all_ranks():
            for batch in batches:
                _run(model, batch, gradients, processes, call)
                if seen == 0:
                    collector.check_finite()
                seen += batch.num_images
                progress.update(batch.num_images)
        if isinstance(batches, ImageBatches):
            batches.merge_across_processes()
        layers, num_images = _merged(collector, gradients, required, seen, processes)
        return _with_joints(layers, joints, model), num_images


def _of_modules(
    required: Mapping[str, frozenset[Statistic]], joints: Mapping[str, Sequence[str]]
) -> dict[str, frozenset[Statistic]]:
    """Return the statistics to collect of single layers: those of a joint layer's inputs from all of its parts."""
    found = {name: statistics for name, statistics in required.items() if name not in joints}
    for joint, layers in joints.items():
        for name in layers:
            found[name] = found.get(name, frozenset()) | required[joint] - GRADIENT_STATISTICS
    return found


def _run(
    model: nn.Module, batch: Batch, gradients: GradientCollector | None, processes: Processes, call: ModelCall
) -> None:
    """Run a model forward over a batch, and backward if gradients are collected."""
    device, dtype = placement(model)
    inputs = batch.inputs.to(device, dtype, non_blocking=True)
    # Activations have gradients only if some input requires them; parameters do not.
    with processes.autocast(device):
        output = call.run(model, inputs if gradients is None else inputs.requiring_gradients())
    if gradients is not None:
        gradients.update(call.select(model, output, len(inputs)), batch.index)
    # The freed graph of activations leaves holes in the heap that the next graph does not fit into.
    del output, inputs
    trim_heap(device)


def _merged(
    collector: StatisticsCollector,
    gradients: GradientCollector | None,
    required: Mapping[str, frozenset[Statistic]],
    seen: int,
    processes: Processes,
) -> tuple[dict[str, LayerStatistics], int]:
    """Return the statistics and the number of images of all processes."""
    num_images = sum(processes.gather(seen))
    if num_images == 0:
        raise ValueError("The calibration dataset holds no image; a few hundred are needed.")
    collector.merge(processes)
    layers = {name: replace(statistics, num_images=num_images) for name, statistics in collector.result().items()}
    if gradients is not None:
        gradients.merge(processes)
        for name in gradients.names:
            base = layers.get(name, LayerStatistics(0))
            layers[name] = replace(base, **gradients.statistics(name, required[name]))
        if processes.is_main:
            _warn_without_gradients([layers[name] for name in gradients.names])
    return layers, num_images


def _warn_without_gradients(layers: Sequence[LayerStatistics]) -> None:
    """Warn if the output depends on none of the layers, so that nothing says which of them matters."""
    found = [getattr(layer, each.value) for layer in layers for each in GRADIENT_STATISTICS]
    if layers and not any(bool(each.count_nonzero()) for each in found if each is not None):
        logger.warning(
            "The output does not change with any of the targeted layers: all gradients are zero, so that ranks are chosen "
            "blindly. Is a weight behind them zero, such as that of a projection which was never trained? Load trained "
            "weights, or name another output by output_names."
        )


def _with_joints(
    layers: Mapping[str, LayerStatistics], joints: Mapping[str, Sequence[str]], model: nn.Module
) -> dict[str, LayerStatistics]:
    """Complete the statistics of joint layers, which lack those of inputs, and of their parts, which lack gradients."""
    found = dict(layers)
    for joint, parts in joints.items():
        moment = found[joint].gradient_moment if joint in found else None
        found[joint] = replace(found[parts[0]], gradient_moment=moment)
        stop = 0
        for part in parts:
            start, stop = stop, stop + model.get_submodule(part).weight.shape[0]
            if moment is not None:
                found[part] = replace(found[part], gradient_moment=moment[start:stop, start:stop])
    return found
