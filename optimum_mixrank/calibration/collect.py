"""Collect the statistics of many layers while a model runs over calibration images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn
from transformers.utils import logging

from ..decomposition.statistics import GRADIENT_STATISTICS, LayerStatistics, Statistic
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.forward import activation_gradients, evaluation_mode
from ..runtime.malloc import trim_heap
from ..runtime.outputs import select_output
from .collector import StatisticsCollector
from .fisher import GradientCollector
from .images.batches import ImageBatches


class ImageBatch(Protocol):
    """What calibration needs of a batch."""

    @property
    def pixel_values(self) -> Tensor:
        """`[batch, channels, height, width]`."""

    @property
    def index(self) -> int:
        """Number of the batch among those of all processes."""


def collect_statistics(
    model: nn.Module,
    batches: Iterable[ImageBatch],
    required: Mapping[str, frozenset[Statistic]],
    num_images: int | None = None,
    *,
    fisher_samples: int = 1,
    seed: int = 42,
    processes: Processes = SINGLE_PROCESS,
) -> tuple[dict[str, LayerStatistics], int]:
    """Run a model over images and collect statistics of its layers.

    One forward pass over the images in evaluation mode, without gradients unless gradients are asked for; the model is
    left as it was. Several processes each run over their own batches; all get the same statistics, those that one
    process gets from all batches up to rounding in float64.

    Args:
        model: A model that takes `pixel_values`.
        batches: Batches of images; of several processes, those of this one.
        required: Statistics to collect, by module name.
        num_images: Their number in all processes, where known, for the progress bar.
        fisher_samples: Random probes per image for statistics of gradients; each costs a backward pass.
        seed: Of these probes.
        processes: Those that share the batches out.

    Returns:
        The statistics by module name, and the number of images seen.

    Raises:
        ValueError: if there is no image, a layer is never called, or NaN or Inf occur.
    """
    with_gradients = [name for name, statistics in required.items() if statistics & GRADIENT_STATISTICS]
    projected = [name for name in with_gradients if Statistic.GRADIENT_MOMENT not in required[name]]
    forward = {name: statistics - GRADIENT_STATISTICS for name, statistics in required.items()}
    share = None if num_images is None else math.ceil(num_images / processes.count)
    gradients: GradientCollector | None = None
    images = 0
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        collector = stack.enter_context(StatisticsCollector(model, forward))
        progress = stack.enter_context(logging.tqdm(total=share, desc="Calibrating", unit="img"))
        if with_gradients:
            gradients = stack.enter_context(GradientCollector(model, with_gradients, fisher_samples, seed, projected))
            stack.enter_context(activation_gradients(model))
        with processes.raise_on_all_ranks():
            for batch in batches:
                _run(model, batch, gradients, processes)
                if images == 0:
                    collector.check_finite()
                images += len(batch.pixel_values)
                progress.update(len(batch.pixel_values))
        if isinstance(batches, ImageBatches):
            batches.merge_across_processes()
        seen = sum(processes.gather(images))
        if seen == 0:
            raise ValueError("The calibration dataset holds no image; a few hundred are needed.")
        collector.merge(processes)
        layers = {name: replace(statistics, num_images=seen) for name, statistics in collector.result().items()}
        if gradients is not None:
            gradients.merge(processes)
            for name in with_gradients:
                layers[name] = replace(layers[name], **gradients.statistics(name, required[name]))
        return layers, seen


def _run(model: nn.Module, batch: ImageBatch, gradients: GradientCollector | None, processes: Processes) -> None:
    """Run a model over a batch, and back again where gradients are collected."""
    parameter = next(model.parameters())
    device = getattr(model, "device", parameter.device)
    pixel_values = batch.pixel_values
    pixel_values = pixel_values.to(device, parameter.dtype, non_blocking=pixel_values.is_pinned())
    # Some input has to require gradients for the activations to have any; parameters do not.
    with processes.autocast(device):
        output = model(pixel_values=pixel_values.detach().requires_grad_(gradients is not None))
    if gradients is not None:
        gradients.update(select_output(output, getattr(model, "config", None)), batch.index)
    # Blocks of a graph of activations leave holes, into which those of the next one do not fit.
    del output, pixel_values
    trim_heap(device)
