"""Run the compensation steps of a configuration, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..calibration.images import Batch, ImageBatches
from ..calibration.result import Calibration
from ..distributed import ALONE, Processes
from ..journal import NO_JOURNAL, Journal
from ..layout import FactoredLayer
from ..memory_plan import MemoryPlan
from ..messages import get_logger
from ..outputs import ModelOutput
from ..phases import phase
from ..targets import Target
from .compensator import COMPENSATORS, Compensation, CompensationResult
from .held_out import compensate_and_keep_the_better, held_out_masks, model_outputs, output_error, split_batches
from .photographs import Photographs
from .saved_steps import resume_steps, save_steps


if TYPE_CHECKING:
    from ..configuration import MixRankConfig

logger = get_logger(__name__)


@dataclass(frozen=True)
class CompensationImages:
    """Images for compensation; of several processes, the share of this one.

    Attributes:
        batches: To learn from, by number, each `[batch, channels, height, width]`.
        held_out: To decide by.
        references: Outputs of the original on these.
        photographs: The images to learn from in more detail, where a step uses it and the source has it.
    """

    batches: Mapping[int, Tensor]
    held_out: Sequence[Tensor]
    references: Sequence[ModelOutput]
    photographs: Photographs | None = None


def prepare_images(
    original: nn.Module,
    images: Sequence[Batch],
    config: MixRankConfig,
    processes: Processes = ALONE,
    source: ImageBatches | None = None,
) -> CompensationImages:
    """Split the images and run the original over those that are held out; nothing is changed.

    Args:
        original: The original model.
        images: Of this process.
        config: The configuration.
        processes: Those that share the images out.
        source: Where the images come from.

    Raises:
        ValueError: if there are too few images, or the original does not give the same output twice.
    """
    numbered = {batch.index: batch.pixel_values for batch in images}
    batches, held_out = split_batches(numbered, config.held_out_ratio, config.seed, processes)
    with processes.agreed():
        references = model_outputs(original, held_out)
        again = model_outputs(original, held_out[:1])
        if again and output_error(again, references[:1]) > 1e-6:
            raise ValueError(
                f"{type(original).__name__} gives another output each time for the same images (random masks, say), so "
                "nothing can be learned from it. Load it without that, or set compensation=[]."
            )
    photographs = _photographs(source, numbered, config, processes)
    return CompensationImages(batches, held_out, references, photographs)


def _photographs(
    source: ImageBatches | None, batches: Mapping[int, Tensor], config: MixRankConfig, processes: Processes
) -> Photographs | None:
    if not any(COMPENSATORS[name].uses_photographs for name in config.compensation) or config.view_scale == 1:
        return None
    enlarged = None if source is None else source.enlarged(config.view_scale)
    if enlarged is None:
        logger.info("Views are taken from the images as the model sees them: the source does not give larger ones.")
        return None
    masks = held_out_masks(batches, config.held_out_ratio, config.seed, processes)
    return Photographs(enlarged, masks, processes)


def compensate(
    original: nn.Module,
    model: nn.Module,
    targets: Sequence[Target],
    rank_map: Mapping[str, FactoredLayer],
    calibration: Calibration | None,
    images: CompensationImages,
    config: MixRankConfig,
    processes: Processes = ALONE,
    journal: Journal = NO_JOURNAL,
    memory: MemoryPlan | None = None,
) -> list[CompensationResult]:
    """Improve a compressed model in place by the steps that `config.compensation` names.

    Args:
        original: The original model.
        model: The compressed model.
        targets: The targeted layers of the original.
        rank_map: The factored layers, by canonical name.
        calibration: Statistics, or None.
        images: See `prepare_images`.
        config: The configuration.
        processes: Those that share the images out.
        journal: Where the outcome of every step is noted, and found when the run goes on.
        memory: How much is to be kept, and where; None keeps the most, in memory.

    Returns:
        What came of every step.

    Raises:
        ValueError: if NaN or Inf occur.
    """
    memory = memory or MemoryPlan({})
    task = Compensation(
        original=original,
        model=model,
        targets=targets,
        rank_map=rank_map,
        statistics={} if calibration is None else calibration.layers,
        batches=list(images.batches.values()),
        held_out=images.held_out,
        references=images.references,
        config=config,
        processes=processes,
        numbers=list(images.batches),
        journal=journal,
        kept_outputs=memory.kept_outputs,
        spills=memory.spills,
        photographs=images.photographs,
    )
    num_held_out = sum(processes.gather(sum(map(len, images.held_out))))
    results = resume_steps(task)
    for position, name in enumerate(config.compensation[len(results) :], len(results)):
        step = replace(task, journal=journal.part(f"step{position}"))
        with phase(f"Compensated ({name})") as compensating:
            result = compensate_and_keep_the_better(COMPENSATORS.create(name), step)
            compensating.tell(
                f"error on {num_held_out:,} held-out images {result.error_before:.4g} -> {result.error_after:.4g}",
                "kept" if result.kept else "not kept",
            )
        if not result.kept:
            logger.warning(
                f"Compensation {name!r} did not lower the error on the {num_held_out} held-out "
                f"images ({result.error_before:.4g} -> {result.error_after:.4g}) and was not kept."
            )
        results.append(result)
        save_steps(task, results)
        step.journal.clear()
    return results
