"""Compare the outputs of two models by all measures of their kind."""

from __future__ import annotations

from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.fidelity import DIFFERENT_HEADS
from ...runtime.model_output import ModelOutput
from .measure import MEASURES, Measure


class Comparison:
    """Compares a model with its original, batch by batch.

    Attributes:
        kind: The kind of the outputs; None before the first batch.
    """

    def __init__(self) -> None:
        self.kind: str | None = None
        self._measures: list[Measure] = []

    def add(self, original: ModelOutput, output: ModelOutput, num_images: int) -> None:
        """Add the outputs for a batch of images, on the CPU.

        Raises:
            ValueError: if the outputs are of different kinds or shapes.
        """
        if original.kind != output.kind or (self.kind is not None and self.kind != original.kind):
            raise ValueError(DIFFERENT_HEADS)
        if self.kind is None:
            self.kind = original.kind
            self._measures = [measure() for measure in measures_of(self.kind)]
        for measure in self._measures:
            measure.add(original, output, num_images)

    def result(self, processes: Processes = SINGLE_PROCESS) -> tuple[str | None, dict[str, float]]:
        """Return the kind of the outputs, and the values of its measures over the images of all processes by name."""
        gathered = processes.gather((self.kind, {each.name: each.state() for each in self._measures}))
        kind = next((kind for kind, _ in gathered if kind is not None), None)
        found: dict[str, float] = {}
        for measure in [] if kind is None else measures_of(kind):
            value = measure.result([states[measure.name] for _, states in gathered if measure.name in states])
            if value is not None:
                found[measure.name] = value
        return kind, found


def measures_of(kind: str) -> list[type[Measure]]:
    """Return the measures that suit a kind of outputs; a kind without any is compared like features."""
    found = [measure for measure in MEASURES.values() if kind in measure.kinds]
    return found or [measure for measure in MEASURES.values() if "features" in measure.kinds]
