"""One calibration: what its statistics are taken from, for all layers at once or for some of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..decomposition import Metric, Statistic
from ..distributed import ALONE, Processes
from ..journal import NO_JOURNAL, Journal
from ..phases import count, phase
from ..targets import Target
from .collect import collect_statistics
from .images import Batch, ImageBatches
from .result import Calibration
from .saved_pass import forget_pass


_STATISTICS = "statistics"


def required_statistics(metrics: Sequence[Metric], targets: Sequence[Target]) -> dict[str, frozenset[Statistic]]:
    """Statistics that metrics need, by module name; layers of which none is needed are left out."""
    required = {
        target.name: frozenset[Statistic]().union(*(metric.required_statistics(*target.shape) for metric in metrics))
        for target in targets
    }
    return {name: statistics for name, statistics in required.items() if statistics}


@dataclass(frozen=True)
class CalibrationRun:
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
    """

    model: PreTrainedModel
    fingerprint: str
    batches: ImageBatches
    decoded: Sequence[Batch] | None
    metrics: Sequence[Metric]
    fisher_samples: int
    seed: int
    processes: Processes = ALONE

    def collect(self, targets: Sequence[Target], journal: Journal = NO_JOURNAL) -> Calibration:
        """Statistics of some layers, in one pass over the images.

        Args:
            targets: The layers.
            journal: Where it is noted how far the pass is, and found when the run goes on.

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
                journal=journal,
            )
            tokens = {statistics.num_tokens for statistics in layers.values()}
            calibrating.tell(
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

    def collect_once(self, targets: Sequence[Target], journal: Journal) -> Calibration:
        """The same, from the journal where they had been taken before the run was cut off.

        Raises:
            ValueError: as `collect`, and if the journal is of another model or of other images.
        """
        calibration = self._finished(journal)
        if calibration is not None:
            calibration.check(self.fingerprint, None if self.decoded is None else self.batches.fingerprint)
            return calibration
        calibration = self.collect(targets, journal)
        with self.processes.agreed():
            if journal.is_kept and self.processes.is_main:
                calibration.save(journal.path(_STATISTICS, shared=True))
        # What was noted on the way is superfluous now.
        forget_pass(journal)
        return calibration

    def _finished(self, journal: Journal) -> Calibration | None:
        """Statistics in the journal, if all processes find them."""
        with self.processes.agreed():
            path = journal.path(_STATISTICS, shared=True) if journal.is_kept else None
            found = None if path is None or not path.is_file() else Calibration.load(path)
        return found if all(self.processes.gather(found is not None)) else None
