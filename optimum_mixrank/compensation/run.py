"""Run the compensation steps of a configuration, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.result import Calibration
from ..layout import FactoredLayer
from ..targets import Target
from .compensator import COMPENSATORS, Compensation, CompensationResult
from .held_out import compensate_and_keep_the_better, model_outputs, split_batches


if TYPE_CHECKING:
    from ..configuration import MixRankConfig

logger = logging.get_logger(__name__)


def compensate(
    original: nn.Module,
    model: nn.Module,
    targets: Sequence[Target],
    rank_map: Mapping[str, FactoredLayer],
    calibration: Calibration | None,
    images: Sequence[Tensor],
    config: MixRankConfig,
) -> list[CompensationResult]:
    """Improve a compressed model in place by the steps that `config.compensation` names.

    Args:
        original: The original model.
        model: The compressed model.
        targets: The targeted layers of the original.
        rank_map: The factored layers, by canonical name.
        calibration: Statistics, or None.
        images: Calibration images as `pixel_values`, `[batch, channels, height, width]`.
        config: The configuration.

    Returns:
        What came of every step.

    Raises:
        ValueError: if there are too few images, or NaN or Inf occur.
    """
    batches, held_out = split_batches(images, config.held_out_ratio, max(len(batch) for batch in images))
    references = model_outputs(original, held_out)
    task = Compensation(
        original=original,
        model=model,
        targets=targets,
        rank_map=rank_map,
        statistics={} if calibration is None else calibration.layers,
        batches=batches,
        held_out=held_out,
        config=config,
    )
    results = []
    for name in config.compensation:
        result = compensate_and_keep_the_better(COMPENSATORS.create(name), task, references)
        if not result.kept:
            logger.warning(
                f"Compensation {name!r} did not lower the error on the {sum(map(len, held_out))} held-out images "
                f"({result.error_before:.4g} -> {result.error_after:.4g}) and was not kept."
            )
        results.append(result)
    return results
