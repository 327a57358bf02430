"""One calibration: what statistics are taken from, for all layers at once or for some of them at a time."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..checkpoint.names import Target
from ..decomposition import Metric, Statistic
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.formatting import count
from ..runtime.journal import NO_JOURNAL, Journal
from ..runtime.phases import phase
from .collect import collect_statistics
from .images.batches import Batch, ImageBatches
from .result import Calibration


def required_statistics(metrics: Sequence[Metric], targets: Sequence[Target]) -> dict[str, frozenset[Statistic]]:
    """Statistics that metrics need, by module name; layers of which none is needed are left out."""
    required = {
        target.name: frozenset[Statistic]().union(*(metric.required_statistics(*target.shape) for metric in metrics))
        for target in targets
    }
    return {name: statistics for name, statistics in required.items() if statistics}


@dataclass(frozen=True)
class CalibrationTask:
    """What statistics are taken from.

    Attributes:
        model: The original model.
        fingerprint: Of the model; see `fingerprint_model`.
        batches: The images, the share of this process.
        decoded: The same, where they have been decoded already.
        metrics: What the statistics are for.
        fisher_samples: Probes per image for the Fisher information.
        seed: Of the probes.
        processes: Those that share the images out.
        journal: Where statistics are kept once they are complete, and found when the run goes on.
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

    def collect(self, targets: Sequence[Target]) -> Calibration:
        """Statistics of some layers, in one pass over the images.

        Args:
            targets: The layers.

        Raises:
            ValueError: for unusable images, NaN or Inf, or layers that never run.
        """
        batches = self.batches
        with phase("Calibrated") as calibrating:
            layers, num_images = collect_statistics(
                self.model,
                batches if self.decoded is None else self.decoded,
                required_statistics(self.metrics, targets),
                batches.num_images,
                fisher_samples=self.fisher_samples,
                seed=self.seed,
                processes=self.processes,
            )
            tokens = {statistics.num_tokens for statistics in layers.values()}
            calibrating.add_detail(
                f"{num_images:,} images", f"{'up to ' * (len(tokens) > 1)}{count(max(tokens))} tokens per layer"
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
        """The same, from the journal where they had been taken before the run was cut off.

        Raises:
            ValueError: as `collect`, and if the journal is of another model or of other images.
        """
        if not self.journal.is_kept:
            return self.collect(targets)
        # By its layers, for another limit of memory makes other groups.
        names = "\n".join(target.name for target in targets).encode()
        path = self.journal.path(f"statistics-{zlib.crc32(names):08x}", shared=True)
        calibration = self._finished(path)
        if calibration is not None:
            calibration.check(self.fingerprint, None if self.decoded is None else self.batches.fingerprint)
            return calibration
        calibration = self.collect(targets)
        with self.processes.raise_on_all_ranks():
            if self.processes.is_main:
                calibration.save(path)
        return calibration

    def _finished(self, path: Path) -> Calibration | None:
        """Statistics in the journal, if all processes find them."""
        with self.processes.raise_on_all_ranks():
            found = Calibration.load(path) if path.is_file() else None
        return found if all(self.processes.gather(found is not None)) else None
