"""How far the compressed model is from the original on images, which the verdict of a report rests on."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..calibration.images.subsets import spread_batches, spread_images
from ..compensation.held_out import model_outputs
from ..compensation.run import CompensationImages
from ..evaluation.measures import Comparison
from ..runtime.formatting import counted
from ..runtime.inputs import ModelInputs
from ..runtime.phases import phase
from .run import CompressionRun


NUM_IMAGES = 256
"""About how many calibration images are used where none are held out."""


def measure_fidelity(run: CompressionRun, model: nn.Module, images: CompensationImages | None) -> dict[str, Any]:
    """Compare a compressed model with the original, on held-out images or, if there are none, on calibration images.

    Args:
        run: The compression.
        model: The compressed model.
        images: The images for compensation, if there is any.

    Returns:
        `num_images`, `held_out`, `kind` and the measures of this kind as in `EvaluationResult`, such as `agreement` and
        `kl`; a value that is not finite is None. Empty if there are no images that can be read again.
    """
    call, held_out = run.call, images is not None
    with phase("Compared with the original") as comparing:
        with run.processes.raise_on_all_ranks():
            batches = list(images.held_out) if images is not None else _calibration_images(run)
            references = images.references if images is not None else model_outputs(run.model, batches, call)
            outputs = model_outputs(model, batches, call)
        if run.batches is not None and images is None:
            run.batches.merge_across_processes()
        count = sum(run.processes.gather(sum(map(len, batches))))
        if count == 0:
            return {}
        comparison = Comparison()
        with run.processes.raise_on_all_ranks():
            for batch, reference, output in zip(batches, references, outputs, strict=True):
                comparison.add(reference, output, len(batch))
        kind, values = comparison.result(run.processes)
        found = {name: value if math.isfinite(value) else None for name, value in values.items()}
        comparing.add_detail(counted(count, "image"))
    return {"num_images": count, "held_out": held_out, "kind": kind, **found}


def _calibration_images(run: CompressionRun) -> list[ModelInputs]:
    """Return some of this process's calibration images, spread over all; none if they cannot be read again."""
    batches, processes = run.batches, run.processes
    if batches is None:
        return []
    if batches.is_in_memory:
        # Its own images alone: an error in reading must not leave the other processes waiting.
        return spread_images(list(batches), -(-NUM_IMAGES // processes.count))
    try:
        count = len(batches)
    except TypeError:  # a stream
        return []
    sizes = {processes.index + position * processes.count: run.reader.batch_size for position in range(count)}
    chosen = set(spread_batches(sizes, NUM_IMAGES, processes))
    return [batch.inputs for batch in batches if batch.index in chosen]
