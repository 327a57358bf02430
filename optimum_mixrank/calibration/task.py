"""One calibration: what statistics are collected from, for all layers at once or for some of them at a time."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..checkpoint.names import Target
from ..decomposition import KfacMetric, Metric, Statistic
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.formatting import counted, format_count
from ..runtime.journal import NO_JOURNAL, Journal
from ..runtime.outputs import PLAIN_CALL, ModelCall
from ..runtime.phases import phase
from .collect import collect_statistics
from .images.batches import Batch, ImageBatches
from .result import Calibration
from .sites import SharedInput, Site


def required_statistics(
    metrics: Sequence[Metric], targets: Sequence[Target], sites: Sequence[Site] = ()
) -> dict[str, frozenset[Statistic]]:
    """Return the statistics that metrics need, by module name, of all layers for which they need any.

    Args:
        metrics: The metrics.
        targets: The layers.
        sites: Layers that a metric with a common unit prices together; joint layers are named like their `Target`.
    """
    priced = sites if any(metric.common_unit for metric in metrics) else ()
    together = {layer.name for site in priced for layer in site.layers}
    required = {
        target.name: frozenset[Statistic]().union(
            *(
                metric.required_statistics(*target.shape)
                for metric in metrics
                # K-FAC finds all that it needs among the statistics of sites.
                if not isinstance(metric, KfacMetric) or target.name not in together
            )
        )
        for target in targets
    }
    for site in priced:
        for target in (site.joint,) if isinstance(site, SharedInput) else (site.first, site.second):
            required[target.name] = required.get(target.name, frozenset()) | _OF_SITES
    return {name: statistics for name, statistics in required.items() if statistics}


_OF_SITES = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.GRADIENT_MOMENT})
"""Everything that a site can be priced from; see `decomposition.mlp`."""


def joint_layers(sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """Return the module names of the layers that each joint layer of the sites stands for, by the name of its `Target`."""
    joints = [site.joint if isinstance(site, SharedInput) else site.first for site in sites]
    return {joint.name: tuple(member.name for member in joint.members) for joint in joints if joint.members}


@dataclass(frozen=True)
class CalibrationTask:
    """What statistics are collected from, and for which metrics.

    Attributes:
        fingerprint: Fingerprint of the model; see `fingerprint_model`.
        batches: The images of this process.
        decoded: Those of these batches that are used, if they have been decoded already.
        fisher_samples: Probes per image for the Fisher information; `seed` is their seed.
        journal: Where complete statistics are kept for a run that is resumed.
        images_known: Whether the journal is known to belong to the bytes of these images.
        call: How the model is called, and for which of its outputs gradients are computed.
        sites: Layers whose structures are decided together.
    """

    model: PreTrainedModel
    fingerprint: str
    batches: ImageBatches
    decoded: Sequence[Batch] | None
    metrics: Sequence[Metric]
    fisher_samples: int
    seed: int
    processes: Processes = SINGLE_PROCESS
    journal: Journal = NO_JOURNAL
    images_known: bool = False
    call: ModelCall = PLAIN_CALL
    sites: Sequence[Site] = ()

    def collect(self, targets: Sequence[Target]) -> Calibration:
        """Collect the statistics of some layers in one pass over the images.

        Raises:
            ValueError: for unusable images, NaN or Inf, or layers that are never called.
        """
        batches = self.batches
        names = {target.name for target in targets}
        sites = [site for site in self.sites if names.issuperset(layer.name for layer in site.layers)]
        total = batches.num_images
        if self.decoded is not None:
            total = sum(self.processes.gather(sum(batch.num_images for batch in self.decoded)))
        with phase("Calibrated") as calibrating:
            layers, num_images = collect_statistics(
                self.model,
                batches if self.decoded is None else self.decoded,
                required_statistics(self.metrics, targets, sites),
                total,
                fisher_samples=self.fisher_samples,
                seed=self.seed,
                processes=self.processes,
                call=self.call,
                joints=joint_layers(sites),
            )
            tokens = {statistics.num_tokens for statistics in layers.values()}
            calibrating.add_detail(
                counted(num_images, "image"),
                f"{'up to ' * (len(tokens) > 1)}{format_count(max(tokens))} tokens per layer",
            )
        return Calibration(
            layers,
            num_images,
            tuple(batches.broken),
            calibrating.seconds,
            self.fingerprint,
            batches.fingerprint,
            self.fisher_samples if any(each.has_gradients for each in layers.values()) else None,
        )

    def collect_once(self, targets: Sequence[Target]) -> Calibration:
        """Return the statistics of some layers from the journal, or collect them and keep them there.

        Raises:
            ValueError: as `collect`, and if the journal belongs to another model or to other images.
        """
        if not self.journal.is_kept:
            return self.collect(targets)
        # The file is named after the layers, since another limit of memory divides them into other groups.
        names = "\n".join(target.name for target in targets).encode()
        path = self.journal.path(f"statistics-{zlib.crc32(names):08x}", shared=True)
        with self.processes.raise_on_all_ranks():
            kept = self._load(path) if path.is_file() else None
        kept = self.processes.all_or_none(kept)
        if kept is not None:
            self._check(kept)
            return kept
        calibration = self.collect(targets)
        with self.processes.raise_on_all_ranks():
            if self.processes.is_main:
                calibration.save(path, self.journal.run or "")
        return calibration

    def _load(self, path: Path) -> Calibration:
        try:
            return Calibration.load(path, self.journal.run)
        except ValueError as error:
            raise ValueError(f"{error} To do so, remove {str(path.parent)!r} and start over.") from error

    def _check(self, calibration: Calibration) -> None:
        """Check that statistics belong to this model and to these images, which are read if need be."""
        if self.decoded is None and self.images_known:
            calibration.check(self.fingerprint)
            return
        if self.decoded is None:
            self.batches.read_through()
        calibration.check(self.fingerprint, self.batches.fingerprint)
