"""Calibrate and decompose one group of layers after the other, so that the statistics of one group are held at a time."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

from .calibration.result import Calibration
from .calibration.run import CalibrationRun
from .decomposition import Decomposition, Metric
from .decomposition.statistics import GRADIENT_STATISTICS
from .journal import Journal
from .phases import phase
from .stages import decompose_layers
from .targets import Target


def decompose_by_groups(
    metric: Metric,
    groups: Sequence[Sequence[Target]],
    layout: str,
    run: CalibrationRun,
    keep_gradients: bool,
    journal: Journal,
) -> tuple[dict[str, Decomposition], Calibration, float]:
    """Decompositions by canonical name, the statistics that later steps need, and the seconds that decomposing took.

    Every group takes a pass over the images. Of several groups, what is found is kept on the host.

    Args:
        metric: How errors are measured.
        groups: The layers.
        layout: How factors will be stored.
        run: What statistics are taken from.
        keep_gradients: Whether later steps need the Fisher information; means are always kept.
        journal: Where it is noted what takes long, and found when the run goes on.

    Raises:
        ValueError: as `CalibrationRun.collect_once` and `decompose_layers`.
    """
    decompositions: dict[str, Decomposition] = {}
    parts: list[Calibration] = []
    seconds = 0.0
    device = None if len(groups) == 1 else "cpu"
    for group in groups:
        # By its layers, for another limit of memory makes other groups.
        layers_of_group = "\n".join(target.name for target in group).encode()
        own = journal if len(groups) == 1 else journal.part(f"group{zlib.crc32(layers_of_group):08x}")
        part = run.collect_once(group, own)
        with phase("Decomposed") as decomposing:
            found = decompose_layers(metric, group, part, layout, run.processes, own)
            decomposing.tell(f"{len(group)} layers")
        seconds += decomposing.seconds
        decompositions |= {name: each if device is None else each.to(device) for name, each in found.items()}
        kept = GRADIENT_STATISTICS if keep_gradients else frozenset()
        layers = {name: statistics.only(kept, device) for name, statistics in part.layers.items()}
        parts.append(dataclasses.replace(part, layers=layers))
        # Before the next pass; on a GPU they are not those that are kept.
        del part, found, layers
    together = dataclasses.replace(
        parts[0],
        layers={name: statistics for part in parts for name, statistics in part.layers.items()},
        seconds=sum(part.seconds for part in parts),
    )
    return decompositions, together, seconds
