"""Measure the loss of one structure per curve of predicted losses; see `allocation.probes`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import starmap
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from ..allocation.choice import LayerChoice
from ..allocation.probes import Probe
from ..calibration.images.batches import Batch
from ..calibration.images.subsets import spread_images
from ..calibration.result import Calibration
from ..checkpoint.factorize import insert_layer
from ..checkpoint.modeling import replace_module
from ..compensation.held_out import model_outputs, output_error
from ..compensation.routes import find_route
from ..compensation.segments import SegmentReplay
from ..runtime.forward import evaluation_mode
from ..runtime.inputs import ModelInputs
from ..runtime.logging import get_logger
from ..runtime.outputs import ModelOutput
from ..runtime.phases import phase
from .decompose import Decompositions, LayerFactory, places_of
from .run import CompressionRun


logger = get_logger(__name__)

_ENTRY = "scales"

MOST = 30.0
"""How far a factor may be from the median of all; what lies beyond is noise, or far from where a curve can be trusted."""


def scale_losses(
    run: CompressionRun, decompositions: Decompositions, calibration: Calibration | None, images: Sequence[Batch]
) -> dict[str, float]:
    """Scale all curves of predicted losses by measured ones; return the factors by the names of layers and sites.

    The loss of a structure is the error of the model's output, see `output_error`, with that structure alone in the
    original model and without compensation. Each block is replayed from its own inputs, so that only it and the blocks
    after it are run. The factors are kept in the journal, so that a run that is resumed chooses the same structures.
    """
    known = _saved(run)
    if known is not None:
        decompositions.scale(known)
        return known
    batches = spread_images(images, run.config.probed_images, run.processes)
    probes = run.budget.probes(decompositions.losses(run.metric), decompositions.mlp_losses)
    factory = LayerFactory(decompositions, calibration, "factors", keep=True)
    scales: dict[str, float] = {}
    with phase("Measured losses") as measuring, evaluation_mode(run.model):
        references = model_outputs(run.model, batches, run.call)
        bar = logging.tqdm(total=len(probes), desc="Measuring losses", unit="structure")
        with bar:
            for probe, outputs in _by_segment(run, probes, batches, references):
                error = output_error(_outputs_with(run, probe, factory, outputs), references, run.processes)
                scales[probe.name] = error / probe.loss
                bar.update()
        measuring.add_detail(f"{len(probes)} structures")
    run.seconds["probe"] = measuring.seconds
    names = [*decompositions.layers, *decompositions.mlp_losses]
    scales = run.processes.broadcast(_bounded(scales, names))
    with run.processes.raise_on_all_ranks():
        run.journal.save(_ENTRY, {}, {"scales": scales}, shared=True)
    decompositions.scale(scales)
    return scales


def _saved(run: CompressionRun) -> dict[str, float] | None:
    """Return the factors that an interrupted run has measured, or None."""
    with run.processes.raise_on_all_ranks():
        entry = run.journal.load(_ENTRY, shared=True)
    entry = run.processes.all_or_none(entry)
    return None if entry is None else dict(entry.values["scales"])


def _bounded(scales: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return factors for all curves: those that were not measured get the median, and none is too far from it.

    Losses of features are measured in another unit than they are predicted in, so that only ratios of factors matter.
    """
    finite = [scale for scale in scales.values() if math.isfinite(scale) and scale > 0]
    middle = statistics.median(finite) if finite else 1.0
    found = {name: scales.get(name, middle) for name in names}
    # A structure with which the model overflows loses the most.
    found = {name: scale if math.isfinite(scale) else MOST * middle for name, scale in found.items()}
    return {name: min(max(scale, middle / MOST), MOST * middle) for name, scale in found.items()}


def _by_segment(
    run: CompressionRun, probes: Sequence[Probe], batches: Sequence[ModelInputs], references: Sequence[ModelOutput]
) -> Iterator[tuple[Probe, Callable[[], list[ModelOutput]]]]:
    """Yield the probes in forward order, with the function that returns the outputs of the model as it is then."""
    call, names = run.call, {target.canonical_name: target.name for target in run.targets}
    route = find_route(run.model, list(names.values()), batches, call, run.processes)
    options: dict[str, Any] = {"call": call, "keep_results": True, "own_outputs": route.own_outputs}
    replay = _if_possible(lambda: SegmentReplay(run.model, route.segments, batches, **options))
    prefixes = tuple(f"{segment}." for segment in route.segments)
    for segment in route.segments:
        found = None if replay is None else _if_possible(replay.outputs)
        # Models with several stacks of blocks compute something else from the last output of one.
        exact = found is not None and all(starmap(_agree, zip(found, references, strict=True)))
        if all(run.processes.gather(exact)) and replay is not None:
            outputs = replay.outputs
        else:
            outputs = partial(model_outputs, run.model, batches, call)
        for probe in probes:
            if names[next(iter(probe.choices))].startswith(f"{segment}."):
                yield probe, outputs
        if replay is not None and _if_possible(replay.advance) is None:
            replay = None
    for probe in probes:
        if not names[next(iter(probe.choices))].startswith(prefixes):
            yield probe, partial(model_outputs, run.model, batches, call)


Found = TypeVar("Found")


def _if_possible(function: Callable[[], Found]) -> Found | None:
    """Return what a function returns, or None if blocks cannot be replayed: then whole models are run."""
    try:
        return function()
    except Exception as error:
        logger.debug(f"Blocks are not replayed, since that fails ({type(error).__name__}: {error}).")
        return None


def _agree(found: ModelOutput, reference: ModelOutput) -> bool:
    pairs = list(zip(found.tensors, reference.tensors, strict=True))
    return all(torch.equal(a, b) or torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


@torch.no_grad()
def _outputs_with(
    run: CompressionRun, probe: Probe, factory: LayerFactory, outputs: Callable[[], list[ModelOutput]]
) -> list[ModelOutput]:
    """Return the outputs of the original model with a single structure in it."""
    choices: Mapping[str, LayerChoice] = {
        **{target.canonical_name: LayerChoice() for target in run.targets},
        **probe.choices,
    }
    places = places_of(run.targets, run.sites, choices)
    layers = [layer for place in places for layer in place.target.layers]
    with run.processes.raise_on_all_ranks():
        try:
            for place in places:
                insert_layer(run.model, place.target, factory.make(place).eval(), place.chunks)
            return outputs()
        finally:
            for layer in layers:
                replace_module(run.model, layer.name, layer.module)
