"""The method step by step: calibrate and decompose, allocate ranks, factorize, compensate, report."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from ..allocation.budget import RankBudget
from ..allocation.choice import LayerChoice
from ..allocation.profile import NATS, NORMALISED, BudgetPoint, profile_budgets
from ..calibration.images.batches import Batch, ImageBatches
from ..calibration.images.subsets import spread_batches
from ..calibration.result import Calibration
from ..calibration.task import CalibrationTask, required_statistics
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.factorize import rank_map_of, warn_of_other_layouts
from ..checkpoint.modeling import replace_module
from ..checkpoint.names import Target
from ..checkpoint.quantizer import MixRankHfQuantizer, attach
from ..checkpoint.rank_map import FactoredLayer, layout_version
from ..compensation.compensator import IN_MEMORY, CompensationResult, CompensationTask
from ..compensation.run import CompensationImages, compensate, prepare_images
from ..decomposition.mlp import WidthLosses
from ..reporting.build import Outcome, build_report, measure
from ..reporting.profile import RankProfile
from ..runtime.files import is_local_path
from ..runtime.formatting import counted
from ..runtime.logging import get_logger
from ..runtime.malloc import bounded_heap
from ..runtime.phases import phase
from .costs import latency_record
from .decompose import Decompositions, decompose, decompose_by_groups, factorize_layers, with_joints
from .fidelity import measure_fidelity
from .memory import MemoryPlan, MemoryTask, agree_on_plan, estimate_memory
from .probing import scale_losses
from .run import CompressionRun
from .size import solve_to_size
from .unfinished import check_images


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..reporting import CompressionReport


logger = get_logger(__name__)

ENOUGH_TO_TRAIN = 2000
"""Images below which the recipe that trains says that they are few."""


def compress(run: CompressionRun) -> tuple[PreTrainedModel, CompressionReport]:
    """Compress a model.

    Returns:
        The compressed model (the original itself, if it is compressed in place) and the report.

    Raises:
        ValueError: for unusable images, NaN or Inf in activations, or a limit of memory that cannot be met. The original
            is left as it was.
    """
    with bounded_heap(run.max_memory is not None and run.model.device.type == "cpu"):
        original = measure(run.model, run.call, run.targets)
        images, memory = _images_within_memory(run)
        learning = _prepare_compensation(run, images)
        decompositions, calibration = _decompose(run, images, memory)
        # Some processes may have no images.
        measured = run.config.probed_images > 0 and run.metric.common_unit and any(run.processes.gather(bool(images)))
        if measured:
            scale_losses(run, decompositions, calibration, images)
        allocated = _allocate(run, decompositions)
        model = run.model if run.inplace else copy.deepcopy(run.model)
        with _restored_on_failure(run, model) as untouched:
            _factorize(run, model, decompositions, allocated.choices, calibration)
            results = _compensate(run, untouched, model, calibration, learning, memory, allocated.choices)
            fidelity = measure_fidelity(run, model, learning)
            # Compensation may have chosen new pivots.
            rank_map = rank_map_of(model, run.targets)
            warn_of_other_layouts(rank_map, run.config.layout)
            config = _configuration(run, rank_map)
        attach(model, MixRankHfQuantizer(config, pre_quantized=True))
        report = build_report(
            Outcome(
                config=dataclasses.replace(config, dataset=_shown_dataset(run.config)),
                linears=run.linears,
                choices=allocated.choices,
                sites=run.sites,
                rank_map=rank_map,
                losses=allocated.losses,
                mlp_losses=allocated.mlp_losses,
                original=original,
                model=model,
                calibration=calibration,
                seconds=run.seconds,
                compensation=results,
                predicted=run.metric.common_unit,
                profile=RankProfile(allocated.profile, NATS if run.metric.common_unit else NORMALISED),
                processes=run.processes,
                memory={} if memory is None else memory.record(),
                fidelity=fidelity,
                latency=allocated.latency,
                call=run.call,
            )
        )
    # All processes get the timings of the main one.
    return model, run.processes.broadcast(report)


@dataclass(frozen=True)
class _Allocated:
    """The losses of layers and of MLPs, what was chosen by canonical name, losses under other budgets, and the latency."""

    losses: Mapping[str, np.ndarray]
    mlp_losses: Mapping[str, Sequence[WidthLosses]]
    choices: Mapping[str, LayerChoice]
    profile: Sequence[BudgetPoint]
    latency: Mapping[str, Any]


def _images_within_memory(run: CompressionRun) -> tuple[list[Batch], MemoryPlan | None]:
    """Decode the images for compensation, and plan the memory if it is limited.

    The plan comes first, so that an impossible limit is refused before any work, unless the number of images is only
    known after decoding them.
    """
    own = None if run.batches is None else run.batches.num_own_images
    if run.max_memory is None or own is None:
        images = _decode(run)
        return images, _plan_memory(run, sum(batch.num_images for batch in images) if own is None else own)
    memory = _plan_memory(run, own)
    return _decode(run), memory


def _plan_memory(run: CompressionRun, num_images: int) -> MemoryPlan | None:
    if run.max_memory is None:
        return None
    required = {} if run.calibration is not None else required_statistics([run.metric], run.targets, run.sites)
    sites = run.sites if required else ()
    task = MemoryTask(run.config, required, max(1, num_images), run.reader.batch_size, run.inplace, sites, run.call)
    with run.processes.raise_on_all_ranks():
        plan = estimate_memory(run.model, run.targets, task, run.max_memory)
    return agree_on_plan(plan, run.processes, run.journal.directory)


def _decode(run: CompressionRun) -> list[Batch]:
    """Decode the images for compensation, which needs them many times, and keep them as the model sees them."""
    if not run.config.compensation or run.batches is None:
        return []
    with phase("Decoded") as decoding:
        with run.processes.raise_on_all_ranks():
            images = list(logging.tqdm(run.batches, desc="Decoding", unit="batch"))
        run.batches.merge_across_processes()
        total = sum(run.processes.gather(sum(batch.num_images for batch in images)))
        decoding.add_detail(counted(total, "image"))
    if run.config.recipe == "distilled" and total < ENOUGH_TO_TRAIN:
        logger.warning(
            f"recipe='distilled' trains on {total:,} images, which is few: it gains most from {ENOUGH_TO_TRAIN:,} or more. "
            "Give more images, which need no labels, or use recipe='best', which is faster."
        )
    check_images(run.journal, run.batches.fingerprint, run.processes)
    return images


def _prepare_compensation(run: CompressionRun, images: Sequence[Batch]) -> CompensationImages | None:
    if not run.config.compensation:
        return None
    return prepare_images(run.model, images, run.config, run.processes, run.batches, run.call)


def _decompose(
    run: CompressionRun, images: Sequence[Batch], memory: MemoryPlan | None
) -> tuple[Decompositions, Calibration | None]:
    """Decompose all layers with the given statistics or those of the images; return both."""
    config, metric = run.config, run.metric
    calibration = run.calibration if metric.uses_data else None
    if calibration is not None:
        calibration = with_joints(calibration, run.sites)
    if run.calibration is not None:
        check_statistics(run.calibration, run.fingerprint, run.batches, to_read=not config.compensation)
    if metric.uses_data and calibration is None:
        assert run.batches is not None  # checked when the run was set up
        task = CalibrationTask(
            model=run.model,
            fingerprint=run.fingerprint,
            batches=run.batches,
            decoded=_for_statistics(run, images) if config.compensation else None,
            metrics=[metric],
            fisher_samples=config.fisher_samples,
            seed=config.seed,
            processes=run.processes,
            journal=run.journal,
            images_known=run.images_known,
            call=run.call,
            sites=run.sites,
        )
        groups = [run.targets] if memory is None else _groups(run.targets, memory)
        to_compensate = bool(config.compensation)
        found, calibration, seconds = decompose_by_groups(metric, groups, run.sites, run.budget, task, to_compensate)
    else:
        start = time.perf_counter()
        found = decompose(metric, run.targets, run.sites, calibration, run.budget, run.processes)
        seconds = time.perf_counter() - start
    run.seconds["calibrate"] = 0.0 if calibration is None else calibration.seconds
    run.seconds["decompose"] = seconds
    return found, calibration


def _for_statistics(run: CompressionRun, images: Sequence[Batch]) -> list[Batch]:
    sizes = {batch.index: batch.num_images for batch in images}
    chosen = set(spread_batches(sizes, run.config.closed_form_images, run.processes))
    return [batch for batch in images if batch.index in chosen]


def _groups(targets: Sequence[Target], memory: MemoryPlan) -> list[list[Target]]:
    """Return, for each calibration pass, the layers whose statistics it collects."""
    if memory.passes == 1:
        return [list(targets)]
    by_name = {target.name: target for target in targets}
    return [[by_name[name] for name in group] for group in memory.groups]


def check_statistics(
    calibration: Calibration, fingerprint: str, batches: ImageBatches | None, to_read: bool = True
) -> None:
    """Check that statistics were collected from this model and, if there are images, from these.

    Args:
        calibration: The statistics.
        fingerprint: The fingerprint of the model.
        batches: The images, or None.
        to_read: Whether the images have not been read yet.

    Raises:
        ValueError: if they were not.
    """
    calibration.check(fingerprint)
    if batches is None:
        return
    if to_read:
        with phase("Compared images"):
            batches.read_through()
    calibration.check(fingerprint, batches.fingerprint)


def _allocate(run: CompressionRun, decompositions: Decompositions) -> _Allocated:
    """Allocate the ranks, and compute the losses under other budgets for the report."""
    with phase("Allocated") as allocating:
        losses = decompositions.losses(run.metric)
        mlp_losses = dict(decompositions.mlp_losses)
        problem = run.budget.problem(losses, mlp_losses)
        allocation = run.processes.broadcast(solve_to_size(run.budget, problem, run.config.allocation, run.sites))
        allocating.add_detail(_rank_range(allocation.ranks))
    with phase("Profiled", logging.DEBUG) as profiling:
        profile = profile_budgets(_around(run.budget), losses, run.config.allocation, mlp_losses, problem)
    run.seconds.update(allocate=allocating.seconds, profile=profiling.seconds)
    latency = latency_record(run.budget, allocation)
    return _Allocated(losses, mlp_losses, allocation.choices, profile, latency)


def _rank_range(ranks: Mapping[str, int | None]) -> str:
    """Describe the ranks, as in `ranks 3 to 60`."""
    given = [rank for rank in ranks.values() if rank is not None]
    return f"ranks {min(given)} to {max(given)}" if given else "all layers stay dense"


def _around(budget: RankBudget) -> list[RankBudget]:
    """Return the budget among those of other ratios that can be reached."""
    ratios = sorted({budget.compression_ratio, *(tenths / 10 for tenths in range(1, 10))})
    others = [dataclasses.replace(budget, compression_ratio=ratio, size=None) for ratio in ratios]
    budgets = [budget if each.compression_ratio == budget.compression_ratio else each for each in others]
    return [each for each in budgets if each.is_reachable]


@contextmanager
def _restored_on_failure(run: CompressionRun, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Restore the layers and values of a model that is compressed in place, if its compression fails.

    Yields:
        The original model, from which compensation learns.
    """
    original = copy.deepcopy(model) if run.inplace and run.config.compensation else run.model
    try:
        yield original
    except BaseException:
        if run.inplace:
            for target in run.targets:
                replace_module(model, target.name, target.module)
            if original is not model:
                model.load_state_dict(original.state_dict())
        raise


def _factorize(
    run: CompressionRun,
    model: PreTrainedModel,
    decompositions: Decompositions,
    choices: Mapping[str, LayerChoice],
    calibration: Calibration | None,
) -> None:
    with phase("Factorized") as factorizing:
        rank_map = factorize_layers(
            model, run.targets, run.sites, decompositions, choices, calibration, run.config.layout, run.processes
        )
        factorizing.add_detail(f"{len(rank_map)} of {len(run.targets)} layers")
    # Some are left: those of dense layers, and of layers made by other processes.
    decompositions.layers.clear()
    decompositions.mlps.clear()
    run.seconds["factorize"] = factorizing.seconds


def _compensate(
    run: CompressionRun,
    original: PreTrainedModel,
    model: PreTrainedModel,
    calibration: Calibration | None,
    learning: CompensationImages | None,
    memory: MemoryPlan | None,
    choices: Mapping[str, LayerChoice],
) -> list[CompensationResult]:
    results: list[CompensationResult] = []
    with phase("Compensated", logging.DEBUG) as compensating:
        if learning is not None:
            task = CompensationTask(
                original=original,
                model=model,
                targets=run.targets,
                sites=run.sites,
                choices=choices,
                rank_map=rank_map_of(model, run.targets),
                statistics={} if calibration is None else calibration.layers,
                batches=list(learning.batches.values()),
                held_out=learning.held_out,
                references=learning.references,
                config=run.config,
                processes=run.processes,
                numbers=list(learning.batches),
                storage=IN_MEMORY if memory is None else memory.storage,
                journal=run.journal,
                high_resolution=learning.high_resolution,
                bound_call=run.call,
            )
            results = compensate(task)
    run.seconds["compensate"] = compensating.seconds
    return results


def _configuration(run: CompressionRun, rank_map: Mapping[str, FactoredLayer]) -> MixRankConfig:
    """Return the configuration that is stored with the compressed model."""
    config = dataclasses.replace(
        run.config,
        rank_map={name: entry.to_dict() for name, entry in rank_map.items()},
        layout_version=layout_version(rank_map.values()),
        rank_multiple=run.budget.rank_multiple,
    )
    if run.calibration is not None and run.calibration.fisher_samples is not None:
        config.fisher_samples = run.calibration.fisher_samples
    return config


def _shown_dataset(config: MixRankConfig) -> str | None:
    """Return the dataset of a configuration as reports show it: a Hub id, or the last part of a path."""
    if config.dataset is None or not is_local_path(config.dataset):
        return config.dataset
    return Path(config.dataset).name or None
