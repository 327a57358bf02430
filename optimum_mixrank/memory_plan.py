"""How much memory a compression will need, from shapes alone, and how to make it fit a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .decomposition.statistics import GRADIENT_STATISTICS, Statistic
from .layout import break_even


HOST, DEVICE, DISK = "host", "device", "disk"

KEPT_OUTPUTS = 4 * 2**30
"""Most bytes of the original's outputs that layer-wise compensation keeps rather than computes again."""

HOLES = 1.25
"""What a graph of activations takes on the host, over the bytes of its tensors: the C library keeps holes between them."""

LAYERWISE = frozenset({"sequential", "residual"})
"""Compensation that is counted; steps that train are not."""


@dataclass(frozen=True)
class LayerSize:
    """A targeted layer.

    Attributes:
        name: Module name.
        shape: `(out_features, in_features)`.
        tokens: How often it runs for one image.
        leader: The first of the layers that share its input.
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    leader: str


@dataclass(frozen=True)
class ModelSize:
    """What a model takes, in bytes.

    Attributes:
        layers: The targeted layers, in forward order.
        weights: Parameters and buffers.
        pixels: One image, as the model sees it.
        forward: Activations that a forward pass holds at once, for one image.
        backward: The same on the way there and back to the image.
        boundary: Input of a segment (a block), for one image.
        outputs: Outputs of the targeted layers of a segment, for one image.
        on_host: Whether the model computes on the host.
    """

    layers: Sequence[LayerSize]
    weights: int
    pixels: int
    forward: int
    backward: int
    boundary: int
    outputs: int
    on_host: bool = True


@dataclass(frozen=True)
class MemoryTask:
    """What a compression is asked to do, as far as memory depends on it.

    Attributes:
        required: Statistics to collect, by module name; empty where they are given or not needed.
        num_images: Images of this process.
        batch_size: Images per forward pass.
        layout: How factors are stored.
        compensation: Names of steps.
        mirror: Whether layer-wise steps see mirrored images too.
        kept_share: Share of the weights that is to stay.
        copies: Models that are made beside the one that is there.
    """

    required: Mapping[str, frozenset[Statistic]]
    num_images: int
    batch_size: int
    layout: str = "factors"
    compensation: Sequence[str] = ()
    mirror: bool = True
    kept_share: float = 1.0
    copies: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a compression will need beside the model that is there already.

    Attributes:
        phases: By phase and place (`"host"`, `"device"`, `"disk"`): what takes how many bytes at once.
        groups: Names of the layers of which statistics are collected in one pass over the images, for each pass.
        kept_outputs: Most bytes of the original's outputs that layer-wise compensation may keep.
        spills: Whether layer-wise compensation puts the activations of all images on the disk.
        not_counted: Compensation steps whose memory is not foreseen.
    """

    phases: Mapping[str, Mapping[str, Mapping[str, int]]]
    groups: Sequence[Sequence[str]] = ((),)
    kept_outputs: int = KEPT_OUTPUTS
    spills: bool = False
    not_counted: Sequence[str] = ()

    @property
    def passes(self) -> int:
        """Over the images, to collect statistics."""
        return len(self.groups)

    def peak(self, place: str) -> int:
        """Most bytes at once on the host, on the device or on the disk."""
        return max((sum(places.get(place, {}).values()) for places in self.phases.values()), default=0)

    def __str__(self) -> str:
        """One line for every phase, the largest parts first."""
        lines = [f"Memory beside the model: {self._peaks()}" + (f", {self.passes} passes" if self.passes > 1 else "")]
        for phase, places in self.phases.items():
            for place, parts in places.items():
                largest = sorted(parts.items(), key=lambda part: -part[1])
                listed = ", ".join(f"{what} {format_bytes(size)}" for what, size in largest if size)
                lines.append(f"  {phase}, {place}: {format_bytes(sum(parts.values()))} ({listed})")
        if self.not_counted:
            lines.append(f"  not counted: {', '.join(self.not_counted)}")
        return "\n".join(lines)

    def _peaks(self) -> str:
        places = [place for place in (HOST, DEVICE, DISK) if any(place in places for places in self.phases.values())]
        return ", ".join(f"{format_bytes(self.peak(place))} on the {place}" for place in places)


def plan_memory(
    size: ModelSize, task: MemoryTask, passes: int = 1, kept_outputs: int = KEPT_OUTPUTS, spills: bool = False
) -> MemoryPlan:
    """Foresee the memory of all phases.

    Args:
        size: The model.
        task: What to do.
        passes: Over the images, each collecting statistics of some of the layers.
        kept_outputs: See `MemoryPlan`.
        spills: See `MemoryPlan`.
    """
    compute = HOST if size.on_host else DEVICE
    groups = split_layers(size.layers, passes)
    # What several passes leave is put by on the host.
    store = HOST if passes > 1 else compute
    of_gradients = {name: required & GRADIENT_STATISTICS for name, required in task.required.items()}
    with_gradients = any(of_gradients.values())
    found = sum(decomposition_bytes(layer.shape, task.layout) for layer in size.layers)
    kept = statistics_bytes(size.layers, of_gradients if task.compensation else {})
    # A pass holds its own statistics beside what earlier ones have left; the last one bears most.
    largest = max(groups, key=lambda group: statistics_bytes(group, task.required), default=[])
    collected = statistics_bytes(largest, task.required)
    left = 0 if passes == 1 else round((found + kept) * (1 - 1 / passes))
    batch = min(task.batch_size, task.num_images)
    images = task.num_images * size.pixels if task.compensation else batch * size.pixels
    holes = HOLES if compute == HOST else 1.0
    widest = max((layer.tokens * max(layer.shape) for layer in size.layers), default=0)
    phases: dict[str, dict[str, dict[str, int]]] = {}
    if task.required:
        phases["calibrate"] = _placed(
            (HOST, "images", images),
            (compute, "statistics", collected + bases_bytes(largest, task.required)),
            (compute, "activations", round(batch * (holes * size.backward if with_gradients else size.forward))),
            # Tokens in float32, and centred; of gradients also their squares and a projection.
            (compute, "workspace", (4 if with_gradients else 2) * 4 * batch * widest),
            (store, "decompositions", left),
        )
    phases["decompose"] = _placed(
        (HOST, "images", images if task.compensation else 0),
        (compute, "statistics", collected),
        (store, "decompositions", found if passes == 1 else left + round((found + kept) / passes)),
        (compute, "workspace", max((_decomposition_workspace(layer.shape) for layer in size.layers), default=0)),
    )
    phases["factorize"] = _placed(
        (HOST, "images", images if task.compensation else 0),
        (store, "statistics", kept),
        (store, "decompositions", found),
        (compute, "models", task.copies * size.weights),
        (compute, "workspace", max((_decomposition_workspace(layer.shape) for layer in size.layers), default=0)),
    )
    if LAYERWISE & set(task.compensation):
        views = task.num_images * (2 if task.mirror else 1)
        outputs = views * size.outputs
        compressed = round(size.weights * task.kept_share)
        phases["compensate"] = _placed(
            (HOST, "images", images),
            (store, "statistics", kept),
            # Another compressed one is kept to go back to.
            (compute, "models", (task.copies - 1) * size.weights + 2 * compressed),
            (DISK if spills else compute, "activations between blocks", 2 * views * size.boundary),
            (compute, "outputs of the original", min(outputs, kept_outputs)),
            (compute, "activations", batch * (size.forward + size.outputs)),
            (compute, "workspace", max((_solving_workspace(layer.shape) for layer in size.layers), default=0)),
        )
    not_counted = tuple(name for name in task.compensation if name not in LAYERWISE)
    names = [[layer.name for layer in group] for group in groups]
    return MemoryPlan(phases, names, kept_outputs, spills, not_counted)


def fit_memory(size: ModelSize, task: MemoryTask, limits: Mapping[str, int]) -> MemoryPlan:
    """The fastest plan that keeps to limits.

    Args:
        size: The model.
        task: What to do.
        limits: Bytes by place, `"host"` or `"device"`; a place that is not there is not limited.

    Raises:
        ValueError: if none does; it says what is needed at least.
    """
    units = len({layer.leader for layer in size.layers})
    most = units if task.required else 1
    ways = list(product((KEPT_OUTPUTS, 0), (False, True)))
    if not size.on_host:
        # A GPU computes outputs again faster than a disk gives activations.
        ways.sort(key=lambda way: way[1])
    tried = []
    for passes in sorted({min(most, each) for each in (1, 2, 3, 4, 6, 8, 12, 16, 24, most)}):
        for kept_outputs, spills in ways:
            plan = plan_memory(size, task, passes, kept_outputs, spills)
            over = {place: plan.peak(place) - limit for place, limit in limits.items() if plan.peak(place) > limit}
            if not over:
                return plan
            tried.append((sum(over.values()), plan))
    best = min(tried, key=lambda each: each[0])[1]
    needed = " and ".join(f"{format_bytes(best.peak(place))} on the {place}" for place in limits)
    given = " and ".join(f"{format_bytes(limit)} on the {place}" for place, limit in limits.items())
    fewer = "fewer images, mirror=False, " if task.mirror and LAYERWISE & set(task.compensation) else "fewer images, "
    raise ValueError(
        f"max_memory allows {given}, but at least {needed} is needed beside the model, in {best.passes} passes with a "
        f"batch size of {task.batch_size} and {task.num_images} images. Raise it, or use a smaller batch_size, "
        f"{fewer}or compensation=[]."
    )


def split_layers(layers: Sequence[LayerSize], passes: int) -> list[list[LayerSize]]:
    """Contiguous groups of about as many weights each; layers that share an input stay together."""
    units: dict[str, list[LayerSize]] = {}
    for layer in layers:
        units.setdefault(layer.leader, []).append(layer)
    total = sum(math.prod(layer.shape) for layer in layers)
    groups: list[list[LayerSize]] = [[] for _ in range(max(1, passes))]
    before = 0
    for unit in units.values():
        weight = sum(math.prod(layer.shape) for layer in unit)
        groups[min(len(groups) - 1, int((before + weight / 2) / total * len(groups)))].extend(unit)
        before += weight
    return [group for group in groups if group]


def statistics_bytes(layers: Sequence[LayerSize], required: Mapping[str, frozenset[Statistic]]) -> int:
    """Of statistics in float64; layers that share an input share its statistics."""
    sizes: dict[tuple[str, Statistic], int] = {}
    for layer in layers:
        m, n = layer.shape
        elements = {
            Statistic.INPUT_MEAN: n,
            Statistic.INPUT_VARIANCE: n,
            Statistic.INPUT_COVARIANCE: n * n,
            Statistic.OUTPUT_COVARIANCE: m * m,
            Statistic.GRADIENT_MOMENT: m * m,
            Statistic.INPUT_GRADIENT_MOMENT: n * n,
            Statistic.GRADIENT_ENERGY: 1,
            Statistic.REPRESENTATIVE_INPUT: layer.tokens * n,
        }
        for statistic in required.get(layer.name, ()):
            own = statistic is Statistic.OUTPUT_COVARIANCE or statistic in GRADIENT_STATISTICS
            sizes[layer.name if own else layer.leader, statistic] = 8 * elements[statistic]
    return sum(sizes.values())


def bases_bytes(layers: Sequence[LayerSize], required: Mapping[str, frozenset[Statistic]]) -> int:
    """Of the bases, in float32, on which gradients are projected while statistics are collected."""
    projected = [
        layer
        for layer in layers
        if Statistic.INPUT_GRADIENT_MOMENT in required.get(layer.name, frozenset[Statistic]())
    ]
    return sum(4 * math.prod(layer.shape) for layer in projected)


def decomposition_bytes(shape: tuple[int, int], layout: str) -> int:
    """Of the components that are kept of a layer, in float32."""
    m, n = shape
    return 4 * max(1, int(break_even(m, n, layout))) * (m + n) + 8 * min(m, n)


def format_bytes(count: int) -> str:
    """`1.23 GiB` or `45 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def parse_limits(max_memory: int | str | Mapping[int | str, int | str], device: int | None) -> dict[str, int]:
    """Limits by place, from what Accelerate's `max_memory` may be.

    Args:
        max_memory: A number of bytes or a string like `"8GiB"`, for the host and for the device each; or a mapping of
            `"cpu"` and numbers of devices to these.
        device: Number of the device that computes; None for the host.

    Raises:
        ValueError: for something else.
    """
    from accelerate.utils import convert_file_size_to_int

    if not isinstance(max_memory, Mapping):
        max_memory = {"cpu": max_memory} if device is None else {"cpu": max_memory, device: max_memory}
    limits = {}
    for key, value in max_memory.items():
        if key != "cpu" and not isinstance(key, int):
            raise ValueError(f"max_memory has the key {key!r}; give 'cpu' or the number of a device.")
        try:
            size = convert_file_size_to_int(value)
        except ValueError as error:
            raise ValueError(f"max_memory={value!r} is no size in bytes; write '8GiB' or '500MB', say.") from error
        if size <= 0:
            raise ValueError(f"max_memory={value!r} is not positive.")
        if key == "cpu":
            limits[HOST] = size
        elif key == device:
            limits[DEVICE] = size
    return limits


def _placed(*parts: tuple[str, str, int]) -> dict[str, dict[str, int]]:
    places: dict[str, dict[str, int]] = {}
    for place, what, size in parts:
        places.setdefault(place, {})[what] = places.get(place, {}).get(what, 0) + size
    return places


def _decomposition_workspace(shape: tuple[int, int]) -> int:
    """The weight, both sides of its decomposition and a handful of square matrices, in float64."""
    m, n = shape
    return 8 * (3 * m * n + 8 * min(m, n) ** 2)


def _solving_workspace(shape: tuple[int, int]) -> int:
    """Moments of inputs and of targets with inputs, and what solving with them takes, in float64."""
    m, n = shape
    return 8 * (5 * n * n + 6 * m * n)
