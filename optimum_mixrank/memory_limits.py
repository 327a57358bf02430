"""Foresee the memory of a compression before it starts, say so, and keep it within what the user allows."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .decomposition.statistics import GRADIENT_STATISTICS, Statistic
from .distributed import Processes
from .evaluation.memory import PeakMemory
from .memory_plan import (
    DEVICE,
    DISK,
    HOST,
    MemoryPlan,
    MemoryTask,
    fit_memory,
    format_bytes,
    parse_limits,
    plan_memory,
)
from .memory_probe import probe_model
from .messages import get_logger
from .targets import Target


if TYPE_CHECKING:
    from .configuration import MixRankConfig


logger = get_logger(__name__)

MaxMemory = int | str | Mapping[int | str, int | str] | None
"""A number of bytes, a string such as `"8GiB"`, or these by device, as Accelerate's `max_memory`."""


def foresee_memory(
    model: PreTrainedModel,
    config: MixRankConfig,
    targets: Sequence[Target],
    required: Mapping[str, frozenset[Statistic]],
    num_images: int,
    *,
    batch_size: int,
    inplace: bool,
    max_memory: MaxMemory = None,
) -> MemoryPlan:
    """What a compression will need beside the model, within the limits.

    Args:
        model: The original.
        config: What to do.
        targets: The targeted layers.
        required: Statistics to collect, by module name; empty where they are given.
        num_images: Images of this process.
        batch_size: Images per forward pass.
        inplace: Whether the model itself is compressed.
        max_memory: What is allowed; None sets no limit.

    Raises:
        ValueError: if the limits cannot be kept to, or the model's configuration names no size of images.
    """
    with_gradients = any(statistics & GRADIENT_STATISTICS for statistics in required.values())
    size = probe_model(model, targets, with_gradients)
    task = MemoryTask(
        required=required,
        num_images=max(1, num_images),
        batch_size=batch_size,
        layout=config.layout,
        compensation=config.compensation or [],
        mirror=config.mirror,
        kept_share=1 - config.compression_ratio,
        copies=int(not inplace or bool(config.compensation)),
    )
    if max_memory is None:
        return plan_memory(size, task)
    device = model.device
    return fit_memory(size, task, parse_limits(max_memory, None if device.type == "cpu" else device.index or 0))


def announce_memory(
    model: PreTrainedModel,
    config: MixRankConfig,
    targets: Sequence[Target],
    required: Mapping[str, frozenset[Statistic]],
    num_images: int,
    processes: Processes,
    *,
    batch_size: int,
    inplace: bool,
    max_memory: MaxMemory = None,
    directory: Path | None = None,
) -> MemoryPlan | None:
    """`foresee_memory` for all processes, which make the same number of passes; announced in the log.

    Activations that do not fit are to be put into `directory`; None stands for the system's temporary files.

    Returns:
        The plan; None where no limit is set and the memory cannot be foreseen.

    Raises:
        ValueError: if the limits cannot be kept to, or the disk has too little space.
    """
    plan = None
    with processes.agreed():
        try:
            plan = foresee_memory(
                model,
                config,
                targets,
                required,
                num_images,
                batch_size=batch_size,
                inplace=inplace,
                max_memory=max_memory,
            )
        except Exception as error:
            # What a model of some architecture takes must not stop a compression that nobody has set a limit.
            if max_memory is not None:
                raise
            logger.warning(f"The memory that {type(model).__name__} will need is not known: {error}")
    plans = [each for each in processes.gather(plan) if each is not None]
    if not plans:
        return None
    # All make the same passes; what is kept, and where, each decides for itself.
    most = max(plans, key=lambda each: each.passes)
    plan = most if plan is None else dataclasses.replace(plan, groups=most.groups)
    needs = processes.gather((platform.node(), plan.peak(DISK)))
    with processes.agreed():
        _check_disk(sum(need for node, need in needs if node == platform.node()), directory)
    peaks, *phases = str(plan).splitlines()
    logger.info(peaks)
    for line in phases:
        logger.debug(line)
    return plan


def _check_disk(needed: int, directory: Path | None) -> None:
    """Check that a disk holds what the processes of this machine will put there, in bytes.

    Raises:
        ValueError: if it does not.
    """
    folder = Path(tempfile.gettempdir()) if directory is None else directory
    if needed and needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"Activations of {format_bytes(needed)} do not fit into max_memory, and not into {str(folder)!r} either, where "
            f"{format_bytes(free)} are free. Free some space, raise max_memory, or "
            + ("set TMPDIR to a folder on another disk." if directory is None else "name another folder for the run.")
        )


def layer_groups(targets: Sequence[Target], plan: MemoryPlan | None) -> list[list[Target]]:
    """The layers of which statistics are collected in one pass over the images, for each pass."""
    if plan is None or plan.passes == 1:
        return [list(targets)]
    by_name = {target.name: target for target in targets}
    return [[by_name[name] for name in group] for group in plan.groups]


def memory_record(plan: MemoryPlan | None, peak: PeakMemory) -> dict[str, Any]:
    """What was announced and what was measured, for the report."""
    measured = {HOST: peak.host, DEVICE: peak.device}
    return {
        "announced_bytes": {place: None if plan is None else plan.peak(place) or None for place in measured},
        "peak_bytes": measured,
        "disk_bytes": 0 if plan is None else plan.peak(DISK),
        "passes": 1 if plan is None else plan.passes,
        "not_counted": [] if plan is None else list(plan.not_counted),
    }
