"""Measure the loss of one structure per curve of predicted losses; see `allocation.probes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..allocation.choice import LayerChoice
from ..allocation.probes import Probe
from ..calibration.images.batches import Batch
from ..calibration.result import Calibration
from ..checkpoint.factorize import insert_layer
from ..checkpoint.modeling import replace_module
from ..compensation.held_out import model_outputs, output_error
from ..runtime.outputs import ModelOutput
from ..runtime.phases import phase
from .decompose import Decompositions, LayerFactory, places_of
from .run import CompressionRun


SMALLEST_SCALE, LARGEST_SCALE = 0.1, 100.0
"""Measured losses outside of these multiples of the predicted ones are noise, or far from where a curve can be trusted."""


def scale_losses(
    run: CompressionRun, decompositions: Decompositions, calibration: Calibration | None, images: Sequence[Batch]
) -> dict[str, float]:
    """Scale all curves of predicted losses by measured ones; return the factors by the names of layers and sites.

    The loss of a structure is the error of the model's output, see `output_error`, with that structure alone in the
    original model and without compensation.
    """
    batches = _first(images, run.config.probed_images, run)
    probes = run.budget.probes(decompositions.losses(run.metric), decompositions.mlp_losses)
    with phase("Measured losses") as measuring:
        references = model_outputs(run.model, batches, run.config.model_call)
        scales: dict[str, float] = {}
        for probe in logging.tqdm(probes, desc="Measuring losses", unit="structure"):
            error = _error(run, probe, decompositions, calibration, batches, references)
            scales[probe.name] = min(max(error / probe.loss, SMALLEST_SCALE), LARGEST_SCALE)
        measuring.add_detail(f"{len(probes)} structures")
    run.seconds["probe"] = measuring.seconds
    decompositions.scale(scales)
    return scales


def _first(images: Sequence[Batch], count: int, run: CompressionRun) -> list[Tensor]:
    """Return this process's share of the first images."""
    left = -(-count // run.processes.count)
    found = []
    for batch in images:
        if left <= 0:
            break
        found.append(batch.pixel_values[:left])
        left -= len(found[-1])
    return found


@torch.no_grad()
def _error(
    run: CompressionRun,
    probe: Probe,
    decompositions: Decompositions,
    calibration: Calibration | None,
    batches: Sequence[Tensor],
    references: Sequence[ModelOutput],
) -> float:
    """Return the error of the original model with a single structure in it."""
    choices: Mapping[str, LayerChoice] = {
        **{target.canonical_name: LayerChoice() for target in run.targets},
        **probe.choices,
    }
    places = places_of(run.targets, run.sites, choices)
    factory = LayerFactory(decompositions, calibration, run.config.layout, keep=True)
    layers: list[tuple[str, nn.Module]] = [
        (layer.name, layer.module) for place in places for layer in place.target.layers
    ]
    try:
        for place in places:
            insert_layer(run.model, place.target, factory.make(place), place.chunks)
        outputs = model_outputs(run.model, batches, run.config.model_call)
    finally:
        for name, module in layers:
            replace_module(run.model, name, module)
    return output_error(outputs, references, run.processes)
