"""Run the compensation steps of a configuration, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..calibration.images.batches import Batch, ImageBatches
from ..checkpoint.configuration import MixRankConfig
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.inputs import ModelInputs
from ..runtime.logging import get_logger
from ..runtime.outputs import ModelCall, ModelOutput
from ..runtime.phases import phase
from .compensator import COMPENSATORS, CompensationResult, CompensationTask
from .held_out import compensate_or_restore, held_out_masks, model_outputs, output_error, split_batches
from .saved_steps import resume_steps, save_steps
from .training.high_resolution import HighResolutionImages


logger = get_logger(__name__)


@dataclass(frozen=True)
class CompensationImages:
    """This process's share of the images for compensation, as in `CompensationTask`; `batches` are given by number."""

    batches: Mapping[int, ModelInputs]
    held_out: Sequence[ModelInputs]
    references: Sequence[ModelOutput]
    high_resolution: HighResolutionImages | None = None


def prepare_images(
    original: nn.Module,
    images: Sequence[Batch],
    config: MixRankConfig,
    processes: Processes = SINGLE_PROCESS,
    source: ImageBatches | None = None,
    call: ModelCall | None = None,
) -> CompensationImages:
    """Split the images, and run the original on those that are held out.

    `images` are those of this process; `source` is where they come from, and may give them at a higher resolution.
    `call` says how the original is called; by default as the configuration says.

    Raises:
        ValueError: if there are too few images, or the original does not give the same output twice.
    """
    numbered = {batch.index: batch.inputs for batch in images}
    batches, held_out = split_batches(numbered, config.held_out_ratio, config.seed, processes)
    call = call or config.model_call
    with processes.raise_on_all_ranks():
        references = model_outputs(original, held_out, call)
        again = model_outputs(original, held_out[:1], call)
        if again and output_error(again, references[:1]) > 1e-6:
            raise ValueError(
                f"{type(original).__name__} gives another output each time for the same images, perhaps because it draws "
                "random masks, so nothing can be learned from it. Load a model without randomness, or set "
                "compensation=[]."
            )
    high_resolution = _high_resolution(source, numbered, config, processes)
    return CompensationImages(batches, held_out, references, high_resolution)


def _high_resolution(
    source: ImageBatches | None, batches: Mapping[int, ModelInputs], config: MixRankConfig, processes: Processes
) -> HighResolutionImages | None:
    if not any(COMPENSATORS[name].uses_high_resolution for name in config.compensation) or config.view_scale == 1:
        return None
    if not all(processes.gather(all(batch.is_images for batch in batches.values()))):
        return None
    enlarged = None if source is None else source.enlarged(config.view_scale)
    if enlarged is None:
        logger.info("Views are taken from the images as the model sees them, since the source has no larger ones.")
        return None
    masks = held_out_masks(batches, config.held_out_ratio, config.seed, processes)
    return HighResolutionImages(enlarged, masks, processes)


def compensate(task: CompensationTask) -> list[CompensationResult]:
    """Improve a compressed model in place by the steps in `config.compensation`, and return the result of each.

    The state after each step is saved in the task's journal, from which an interrupted compression continues.

    Raises:
        ValueError: if NaN or Inf occur.
    """
    num_held_out = sum(task.processes.gather(sum(map(len, task.held_out))))
    results = resume_steps(task)
    for position, name in enumerate(task.config.compensation[len(results) :], len(results)):
        step = replace(task, journal=task.journal.part(f"step{position}"))
        with phase(f"Compensated ({name})") as compensating:
            result = compensate_or_restore(COMPENSATORS.create(name), step)
            compensating.add_detail(
                f"error on {num_held_out:,} held-out images {result.error_before:.4g} -> {result.error_after:.4g}",
                "kept" if result.kept else "not kept",
            )
        if not result.kept:
            logger.warning(
                f"Compensation {name!r} failed the test on the {num_held_out} held-out images (error "
                f"{result.error_before:.4g} -> {result.error_after:.4g}) and was not kept."
            )
        results.append(result)
        save_steps(task, results)
        step.journal.clear()
    return results
