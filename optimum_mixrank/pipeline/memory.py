"""Estimate the memory that a compression needs, and fit it into a limit."""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from accelerate.utils import convert_file_size_to_int

from ..calibration.sites import Mlp, Site
from ..calibration.task import joint_layers
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.names import Target
from ..checkpoint.rank_map import break_even
from ..compensation.compensator import IN_MEMORY, MAX_CACHED_OUTPUT_BYTES, ActivationStorage
from ..decomposition.statistics import COMPENSATION_STATISTICS, GRADIENT_STATISTICS, Statistic
from ..runtime.distributed import Processes
from ..runtime.formatting import format_bytes
from ..runtime.logging import get_logger
from ..runtime.outputs import ModelCall
from .memory_probe import LayerSize, ModelSize, probe_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = get_logger(__name__)

MaxMemory = int | str | Mapping[int | str, int | str] | None
"""A number of bytes, a string such as `"8GiB"`, or these by device, as Accelerate's `max_memory`."""

HOST, DEVICE, DISK = "host", "device", "disk"

FRAGMENTATION_FACTOR = 1.25
"""Heap taken by a graph of activations on the host, relative to the bytes of its tensors."""

LAYERWISE = frozenset({"sequential", "residual"})
"""Compensation steps that the estimate covers; it leaves out steps that train."""

Parts = Sequence[tuple[str, float]]
"""Everything that is held at the same time: place and bytes of each part."""


@dataclass(frozen=True)
class MemoryTask:
    """The settings on which the memory of a compression depends.

    Attributes:
        config: The configuration.
        required: Statistics to collect, by module name; empty if they are given or not needed.
        num_images: Images of this process.
        batch_size: Images per forward pass.
        inplace: Whether the model itself is compressed rather than a copy.
        sites: Layers whose structures are decided together.
        call: How the model is called; by default as the configuration says.
    """

    config: MixRankConfig
    required: Mapping[str, frozenset[Statistic]]
    num_images: int
    batch_size: int = 32
    inplace: bool = False
    sites: Sequence[Site] = ()
    call: ModelCall | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a compression needs in addition to the model, and how it keeps to it.

    Attributes:
        phases: Estimated bytes by phase and place (`"host"`, `"device"`, `"disk"`).
        groups: For each calibration pass, the names of the layers whose statistics it collects.
        storage: Where layer-wise compensation keeps activations.
        not_counted: Compensation steps that the estimate leaves out.
    """

    phases: Mapping[str, Mapping[str, int]]
    groups: Sequence[Sequence[str]] = ((),)
    storage: ActivationStorage = IN_MEMORY
    not_counted: Sequence[str] = ()

    @property
    def passes(self) -> int:
        """Number of calibration passes over the images."""
        return len(self.groups)

    def peak(self, place: str) -> int:
        """Return the largest number of bytes held at once in a place."""
        return max((places.get(place, 0) for places in self.phases.values()), default=0)

    def record(self) -> dict[str, Any]:
        """Return what the report stores, as JSON values."""
        estimated = {place: self.peak(place) for place in (HOST, DEVICE) if self.peak(place)}
        rest = {"passes": self.passes, "disk_bytes": self.peak(DISK), "not_counted": list(self.not_counted)}
        return {"estimated_bytes": estimated, **rest}

    def __str__(self) -> str:
        """Return a line with the peaks and one line for every phase."""
        peaks = {place: self.peak(place) for place in (HOST, DEVICE, DISK)}
        lines = [
            f"Memory in addition to the model: {_listed(peaks)}"
            + (f", {self.passes} passes" if self.passes > 1 else "")
        ]
        lines += [f"  {phase}: {_listed(places)}" for phase, places in self.phases.items()]
        if self.not_counted:
            lines.append(f"  not counted: {', '.join(self.not_counted)}")
        return "\n".join(lines)


def estimate_memory(
    model: PreTrainedModel, targets: Sequence[Target], task: MemoryTask, max_memory: MaxMemory = None
) -> MemoryPlan:
    """Plan a compression within a limit of memory; the model runs on one image.

    Args:
        model: The original model.
        targets: The targeted layers.
        task: The settings.
        max_memory: The limit, or None.

    Raises:
        ValueError: if the limit cannot be met, or the model's configuration has no image size.
    """
    with_gradients = any(each & GRADIENT_STATISTICS for each in task.required.values())
    size = _with_sites(probe_model(model, targets, with_gradients, task.call or task.config.model_call), task.sites)
    if max_memory is None:
        return plan_memory(size, task)
    device = model.device
    return fit_memory(size, task, parse_limits(max_memory, None if device.type == "cpu" else device.index or 0))


def plan_memory(
    size: ModelSize, task: MemoryTask, passes: int = 1, storage: ActivationStorage = IN_MEMORY
) -> MemoryPlan:
    """Estimate the memory of all phases.

    Args:
        size: Measurements of the model.
        task: The settings.
        passes: Number of calibration passes, each of which collects the statistics of some layers.
        storage: See `MemoryPlan`.
    """
    compute = HOST if size.on_host else DEVICE
    # The results of several passes are kept on the host.
    store = HOST if passes > 1 else compute
    groups = split_layers(size.layers, passes)
    steps, batch = task.config.compensation, min(task.batch_size, task.num_images)
    images = (HOST, size.pixels * (task.num_images if steps else 0))
    needed_again = {name: required & COMPENSATION_STATISTICS for name, required in task.required.items()}
    joints = joint_layers(task.sites)
    kept = statistics_bytes(size.layers, needed_again if steps else {}, joints)
    collected = max((statistics_bytes(group, task.required, joints) for group in groups), default=0)
    # Hidden units are chosen from these, and solved for, until the layers are made.
    in_mlps = {layer.name for site in task.sites if isinstance(site, Mlp) for layer in site.layers}
    mlps = statistics_bytes([layer for layer in size.layers if layer.name in in_mlps], task.required, joints)
    found = sum(decomposition_bytes(layer.shape, task.config.layout) for layer in size.layers)
    # A pass holds its own statistics beside the results of earlier passes; the last pass holds the most.
    left = (store, (found + kept + mlps) * (1 - 1 / passes))
    # The Fisher information of MLPs is damped in a copy.
    own = found + mlps if passes == 1 else (found + kept + 2 * mlps) / passes
    decomposing = (compute, max((_decomposition_workspace(layer.shape) for layer in size.layers), default=0))
    copies = int(not task.inplace or bool(steps)) * size.weights
    phases: dict[str, Parts] = {}
    if task.required:
        phases["calibrate"] = [
            images if steps else (HOST, size.pixels * batch),
            (compute, collected),
            left,
            (compute, _pass_bytes(size, task, groups, batch)),
        ]
    phases["decompose"] = [images, (compute, collected), left, (store, own), decomposing]
    phases["factorize"] = [images, (store, kept + found + mlps), (compute, copies), decomposing]
    if LAYERWISE & set(steps):
        solved_from = min(task.num_images, task.config.closed_form_images or task.num_images)
        views = solved_from * (2 if task.config.mirror else 1)
        phases["compensate"] = [
            images,
            (store, kept),
            (
                compute,
                copies - size.weights + size.weights * _kept_weights(task.config) * _compressed_copies(task.config),
            ),
            (DISK if storage.on_disk else compute, 2 * views * size.boundary),
            (compute, min(views * size.outputs, storage.max_output_bytes)),
            (compute, batch * (size.forward + size.outputs)),
            (compute, max((_solving_workspace(layer.shape) for layer in size.layers), default=0)),
        ]
    not_counted = tuple(name for name in steps if name not in LAYERWISE)
    names = [[layer.name for layer in group] for group in groups]
    return MemoryPlan({phase: _by_place(parts) for phase, parts in phases.items()}, names, storage, not_counted)


def _compressed_copies(config: MixRankConfig) -> int:
    """Return how often the compressed weights are held while layers are solved.

    A second model is kept in case the step is rolled back. A pivoted layer keeps its reordered matrix between forward
    passes, `rank · out_features` values, which are not more than it stores.
    """
    return 3 if config.layout == "pivoted" else 2


def _kept_weights(config: MixRankConfig) -> float:
    """Return the largest share of the weights that may be left; how much a budget of time removes is not known before."""
    return 1.0 if config.cost == "latency" else 1 - config.compression_ratio


def fit_memory(size: ModelSize, task: MemoryTask, limits: Mapping[str, int]) -> MemoryPlan:
    """Return the fastest plan within the limits.

    Args:
        size: Measurements of the model.
        task: The settings.
        limits: Bytes by place (`"host"`, `"device"`); other places are not limited.

    Raises:
        ValueError: if there is none; the message gives the least that is needed.
    """
    most = len({layer.together for layer in size.layers}) if task.required else 1
    ways = [ActivationStorage(*way) for way in product((MAX_CACHED_OUTPUT_BYTES, 0), (False, True))]
    if not size.on_host:
        # A GPU recomputes outputs faster than a disk delivers activations.
        ways.sort(key=lambda way: way.on_disk)
    tried = []
    for passes in sorted({min(most, each) for each in (1, 2, 3, 4, 6, 8, 12, 16, 24, most)}):
        for way in ways:
            plan = plan_memory(size, task, passes, way)
            over = sum(max(0, plan.peak(place) - limit) for place, limit in limits.items())
            if not over:
                return plan
            tried.append((over, plan))
    best = min(tried, key=lambda each: each[0])[1]
    fewer = "fewer images, mirror=False, " if task.config.mirror and LAYERWISE & set(task.config.compensation) else ""
    raise ValueError(
        f"max_memory allows {_listed(limits, ' and ')}, but at least "
        f"{_listed({place: best.peak(place) for place in limits}, ' and ')} is needed in addition to the model, in "
        f"{best.passes} passes with a batch size of {task.batch_size} and {task.num_images} images. Raise it, or use a "
        f"smaller batch_size, {fewer or 'fewer images, '}or compensation=[]."
    )


def agree_on_plan(plan: MemoryPlan, processes: Processes, directory: Path | None) -> MemoryPlan:
    """Let all processes make as many passes as the one that needs the most; log and return the plan of this process.

    Args:
        plan: The plan of this process.
        processes: The processes that share the work.
        directory: The folder for activations that do not fit into memory; None for the system's temporary folder.

    Raises:
        ValueError: if the disk has too little space.
    """
    # Each process decides for itself where it keeps activations.
    most = max(processes.gather(plan), key=lambda each: each.passes)
    plan = dataclasses.replace(plan, groups=most.groups)
    needs = processes.gather((platform.node(), plan.peak(DISK)))
    needed = sum(need for node, need in needs if node == platform.node())
    folder = Path(tempfile.gettempdir()) if directory is None else directory
    with processes.raise_on_all_ranks():
        if needed and needed > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"Activations of {format_bytes(needed)} do not fit into max_memory, and not into {str(folder)!r} either, "
                f"where {format_bytes(free)} are free. Free some space, raise max_memory, or "
                + (
                    "set TMPDIR to a folder on another disk."
                    if directory is None
                    else "name another folder for the run."
                )
            )
    peaks, *phases = str(plan).splitlines()
    logger.info(peaks)
    for line in phases:
        logger.debug(line)
    return plan


def parse_limits(max_memory: int | str | Mapping[int | str, int | str], device: int | None) -> dict[str, int]:
    """Return the limits in bytes by place.

    Args:
        max_memory: As for Accelerate: a number of bytes or a string such as `"8GiB"`, which limits host and device alike;
            or a mapping from `"cpu"` and device numbers to these.
        device: Number of the device that computes; None for the host.

    Raises:
        ValueError: if `max_memory` is anything else.
    """
    if not isinstance(max_memory, Mapping):
        max_memory = {"cpu": max_memory} if device is None else {"cpu": max_memory, device: max_memory}
    limits = {}
    for key, value in max_memory.items():
        if key != "cpu" and not isinstance(key, int):
            raise ValueError(f"max_memory has the key {key!r}; give 'cpu' or the number of a device.")
        try:
            size = convert_file_size_to_int(value)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"max_memory={value!r} is not a size in bytes; '8GiB' and '500MB' are.") from error
        if size <= 0:
            raise ValueError(f"max_memory={value!r} is not positive.")
        if key in ("cpu", device):
            limits[HOST if key == "cpu" else DEVICE] = size
    return limits


def split_layers(layers: Sequence[LayerSize], passes: int) -> list[list[LayerSize]]:
    """Split layers into contiguous groups with about equally many weights; those that are needed together stay together."""
    units: dict[str, list[LayerSize]] = {}
    for layer in layers:
        units.setdefault(layer.together, []).append(layer)
    total = sum(math.prod(layer.shape) for layer in layers)
    groups: list[list[LayerSize]] = [[] for _ in range(max(1, passes))]
    before = 0
    for unit in units.values():
        weight = sum(math.prod(layer.shape) for layer in unit)
        groups[min(len(groups) - 1, int((before + weight / 2) / total * len(groups)))].extend(unit)
        before += weight
    return [group for group in groups if group]


def _with_sites(size: ModelSize, sites: Sequence[Site]) -> ModelSize:
    names = {layer.name: site.layers[0].name for site in sites for layer in site.layers}
    layers = [dataclasses.replace(layer, site=names.get(layer.name, "")) for layer in size.layers]
    return dataclasses.replace(size, layers=layers)


def statistics_bytes(
    layers: Sequence[LayerSize],
    required: Mapping[str, frozenset[Statistic]],
    joints: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> int:
    """Return the bytes of statistics in float64; layers that share an input share its statistics.

    Args:
        layers: The layers.
        required: Statistics by name of a layer, single or joint.
        joints: The names of the layers that each joint one stands for.
    """
    by_name = {layer.name: layer for layer in layers}
    for joint, parts in joints.items():
        members = [by_name[part] for part in parts if part in by_name]
        if members:
            rows = sum(member.shape[0] for member in members)
            layers = [*layers, dataclasses.replace(members[0], name=joint, shape=(rows, members[0].shape[1]))]
    sizes: dict[tuple[str, Statistic], int] = {}
    for layer in layers:
        for statistic in required.get(layer.name, ()):
            owner = layer.leader if statistic.of_input else layer.name
            sizes[owner, statistic] = 8 * math.prod(statistic.shape(*layer.shape, layer.tokens))
    return sum(sizes.values())


def _pass_bytes(size: ModelSize, task: MemoryTask, groups: Sequence[Sequence[LayerSize]], batch: int) -> float:
    """Return the bytes of activations and workspace in a calibration pass."""
    required = task.required
    with_gradients = any(statistics & GRADIENT_STATISTICS for statistics in required.values())
    activations = (FRAGMENTATION_FACTOR if size.on_host else 1.0) * size.backward if with_gradients else size.forward
    widest = max((layer.tokens * max(layer.shape) for layer in size.layers), default=0)
    projected = Statistic.INPUT_GRADIENT_MOMENT
    # In float32, bases on which gradients are projected.
    bases = (
        sum(4 * math.prod(each.shape) for each in group if projected in required.get(each.name, ()))
        for group in groups
    )
    # Tokens in float32, and centred; of gradients also their squares and a projection.
    return batch * (activations + (4 if with_gradients else 2) * 4 * widest) + max(bases, default=0)


def decomposition_bytes(shape: tuple[int, int], layout: str) -> int:
    """Return the bytes of the components that are kept of a layer, in float32."""
    m, n = shape
    return 4 * max(1, int(break_even(m, n, layout))) * (m + n) + 8 * min(m, n)


def _decomposition_workspace(shape: tuple[int, int]) -> int:
    """Return the bytes of a weight, both sides of its decomposition and a handful of square matrices, in float64."""
    m, n = shape
    return 8 * (3 * m * n + 8 * min(m, n) ** 2)


def _solving_workspace(shape: tuple[int, int]) -> int:
    """Return the bytes of the moments of a layer and the matrices for solving with them, in float64."""
    m, n = shape
    return 8 * (5 * n * n + 6 * m * n)


def _by_place(parts: Parts) -> dict[str, int]:
    return {place: round(sum(size for where, size in parts if where == place)) for place in dict(parts)}


def _listed(places: Mapping[str, int], between: str = ", ") -> str:
    return between.join(f"{format_bytes(size)} on the {place}" for place, size in places.items() if size)
