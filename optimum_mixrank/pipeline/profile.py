"""Ranks and predicted losses under several budgets, without compressing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..allocation.profile import NATS, NORMALISED, profile_budgets
from ..calibration.included import included_as_linear
from ..calibration.result import Calibration
from ..calibration.targets import find_targets, linears_in_blocks, select_targets
from ..checkpoint.configuration import MixRankConfig
from ..decomposition import METRICS
from ..reporting.profile import RankProfile
from ..runtime.logging import get_logger
from .costs import with_ratio
from .decompose import check_weights, decompose, with_joints
from .images import ImageReader
from .run import free_sites, rank_budget, shared_fingerprint
from .size import with_known_ratio


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)


def reachable_ratios(model: PreTrainedModel, config: MixRankConfig, ratios: Sequence[float]) -> list[float]:
    """Return those of some ratios that can be reached; a line says which cannot.

    Raises:
        ValueError: if none can.
    """
    found = []
    for ratio in ratios:
        try:
            check_ratios(model, config, [ratio])
        except ValueError:
            continue
        found.append(ratio)
    if not found:
        check_ratios(model, config, ratios)
    left_out = [f"{ratio:g}" for ratio in ratios if ratio not in found]
    if left_out:
        logger.warning(f"Ratios that this model cannot reach are left out: {', '.join(left_out)}.")
    return found


def check_ratios(model: PreTrainedModel, config: MixRankConfig, ratios: Sequence[float]) -> None:
    """Check, before any images are read, that budgets can be met; nothing is checked of a model that needs them to run.

    Args:
        model: The original.
        config: All settings but the ratio.
        ratios: Values of `compression_ratio`.

    Raises:
        ValueError: for a ratio, or the size that the configuration asks for, that cannot be reached.
    """
    sized = with_known_ratio(model, config)
    with included_as_linear(model, config.include):
        try:
            selected = config.target_modules, config.exclude_modules
            targets = find_targets(model, *selected, config.model_call, config.include)
        except ValueError:
            return
        sites = free_sites(model, config, targets, METRICS.create(config.metric))
        for ratio in ratios:
            asked = sized if ratio == sized.compression_ratio else with_ratio(config, ratio)
            rank_budget(model, asked, targets, sites).check()


def profile_model(
    reader: ImageReader, calibration: Calibration, config: MixRankConfig, ratios: Sequence[float]
) -> RankProfile:
    """Allocate ranks for several compression ratios.

    Args:
        reader: Holds the model and the processes.
        calibration: Statistics for the metric of the configuration.
        config: All settings but the ratio.
        ratios: Values of `compression_ratio`; with `cost="latency"`, shares of the time to remove.

    Raises:
        ValueError: for statistics of another model, or a ratio that cannot be reached.
    """
    model, processes, metric = reader.model, reader.processes, METRICS.create(config.metric)
    calibration.check(shared_fingerprint(model, processes))
    try:
        targets = find_targets(model, config.target_modules, config.exclude_modules, include=config.include)
    except ValueError:
        # There are no images to see what they reach, but their statistics tell it.
        linears = [each for each in linears_in_blocks(model) if each.name in calibration.layers]
        if not metric.uses_data or not linears:
            raise
        targets = select_targets(linears, config.target_modules, config.exclude_modules)
    check_weights(targets)
    statistics = calibration if metric.uses_data else None
    settings = [with_ratio(config, ratio) for ratio in sorted(ratios)]
    sites = free_sites(model, config, targets, metric, statistics)
    budgets = [rank_budget(model, each, targets, sites) for each in settings]
    for budget in budgets:
        budget.check()
    known = statistics if statistics is None else with_joints(statistics, sites)
    found = decompose(metric, targets, sites, known, budgets[0], processes)
    points = profile_budgets(budgets, found.losses(metric), config.allocation, found.mlp_losses)
    return RankProfile(points, NATS if metric.common_unit else NORMALISED)
