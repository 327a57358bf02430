"""What a compensator is, and the registry of compensators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..allocation.choice import LayerChoice
from ..calibration.images.subsets import spread_batches
from ..calibration.sites import Site
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.names import Target
from ..checkpoint.rank_map import FactoredLayer
from ..decomposition import LayerStatistics
from ..runtime import registry
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.inputs import ModelInputs, concatenated
from ..runtime.journal import NO_JOURNAL, Journal
from ..runtime.outputs import ModelCall, ModelOutput
from ..runtime.registry import Registry
from .training.high_resolution import HighResolutionImages


MAX_CACHED_OUTPUT_BYTES = 4 * 2**30
"""Layer-wise compensation caches this much of the original's outputs, and computes the rest again when needed."""


@dataclass(frozen=True)
class ActivationStorage:
    """How much of the original's outputs layer-wise compensation caches, and whether inputs of blocks are on disk."""

    max_output_bytes: int = MAX_CACHED_OUTPUT_BYTES
    on_disk: bool = False


IN_MEMORY = ActivationStorage()


@dataclass
class CompensationTask:
    """What a compensator works on.

    Attributes:
        original: The original model; it is not changed.
        model: The compressed model, in evaluation mode. It is improved in place and must not grow.
        targets: The targeted layers of the original.
        rank_map: The factored layers, by canonical name.
        statistics: Calibration statistics by module name; empty for a metric that uses no data.
        batches: Images to learn from, each batch with the inputs of the model by name.
        held_out: Images in the same form that nothing is learned from; they decide what is kept.
        references: Outputs of the original for the held-out images.
        config: The configuration.
        processes: The processes that share the images; `batches`, `held_out` and `references` are this one's share.
        numbers: The numbers of `batches` among those of all processes, ascending; optional for a single process.
        storage: Where activations are stored.
        journal: Where a compensator can save its progress, and find it when an interrupted compression is resumed.
        high_resolution: The images of `batches` at a higher resolution, if there are any.
        sites: The layers that were decided together.
        choices: What was chosen for every layer, by canonical name.
        bound_call: How the models are called; by default as the configuration says.
    """

    original: nn.Module
    model: nn.Module
    targets: Sequence[Target]
    rank_map: Mapping[str, FactoredLayer]
    statistics: Mapping[str, LayerStatistics]
    batches: Sequence[ModelInputs]
    held_out: Sequence[ModelInputs]
    references: Sequence[ModelOutput]
    config: MixRankConfig
    processes: Processes = SINGLE_PROCESS
    numbers: Sequence[int] = ()
    storage: ActivationStorage = IN_MEMORY
    journal: Journal = NO_JOURNAL
    high_resolution: HighResolutionImages | None = None
    sites: Sequence[Site] = ()
    choices: Mapping[str, LayerChoice] = field(default_factory=dict)
    bound_call: ModelCall | None = None

    @property
    def call(self) -> ModelCall:
        """How the models are called, and which of their outputs are compared."""
        return self.bound_call or self.config.model_call

    def all_images(self) -> ModelInputs:
        """Return the images to learn from of all processes, in the order of their batches; every process calls this."""
        return self._collect(self.numbers or range(len(self.batches)), self.batches)

    def images_to_solve_from(self) -> list[ModelInputs]:
        """Return those of `batches` that layer-wise steps learn from; every process calls this."""
        numbers = self.numbers or range(len(self.batches))
        own = dict(zip(numbers, self.batches, strict=True))
        sizes = {number: len(batch) for number, batch in own.items()}
        chosen = spread_batches(sizes, self.config.closed_form_images, self.processes)
        return [own[number] for number in chosen if number in own]

    def all_high_resolution(self) -> Tensor | None:
        """Return the images of `all_images` at a higher resolution, in float16, or None if there are none."""
        if self.high_resolution is None:
            return None
        own = self.high_resolution.decode()
        return self._collect(list(own), [ModelInputs(each) for each in own.values()]).main

    def all_held_out(self) -> ModelInputs:
        """Return the held-out images of all processes; every process calls this."""
        count = self.processes.count
        return self._collect(range(self.processes.index, count * len(self.held_out), count), self.held_out)

    def _collect(self, numbers: Sequence[int], batches: Sequence[ModelInputs]) -> ModelInputs:
        own = {number: ModelInputs.of(batch) for number, batch in zip(numbers, batches, strict=True)}
        names = next((list(each) for each in self.processes.gather([*next(iter(own.values()), ())]) if each), [])
        found = {name: self.processes.collect({each: batch[name] for each, batch in own.items()}) for name in names}
        return concatenated([{name: found[name][number] for name in names} for number in found[names[0]]])

    @property
    def factored(self) -> list[Target]:
        """The targets that are factored, in forward order."""
        return [target for target in self.targets if target.canonical_name in self.rank_map]


@dataclass(frozen=True)
class CompensationResult:
    """The outcome of a compensation step, for the report.

    Attributes:
        name: The name of the compensator.
        kept: Whether its changes were kept; if not, the model is as it was before.
        error_before: Error on the held-out images before the step, see `held_out.output_error`.
        error_after: The same error after the step.
        details: What the compensator reported, as JSON values.
    """

    name: str
    kept: bool
    error_before: float
    error_after: float
    details: Mapping[str, Any] = field(default_factory=dict)


class Compensator(ABC):
    """Repairs what a compression has damaged, without labels.

    Attributes:
        name: The name by which `MixRankConfig.compensation` refers to it.
        shares_images: Whether each process works on its own share of the images and exchanges its results through
            `task.processes`. Otherwise every process gets all images and does the same work.
        uses_high_resolution: Whether it uses `task.high_resolution`; only a compensator that shares images may.
        chooses_units: Whether it can choose the hidden units that an MLP keeps; required of a step that starts anew.
        starts_anew: Whether it computes every layer afresh from the original, so that it has to be the first step.
        closed_form: Whether it solves regularised least squares, which rarely fail on new images. It is then undone only
            if held-out images show a significant loss; otherwise they have to show a gain. See `held_out.is_accepted`.
    """

    name: ClassVar[str]
    shares_images: ClassVar[bool] = False
    uses_high_resolution: ClassVar[bool] = False
    starts_anew: ClassVar[bool] = False
    chooses_units: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False

    @abstractmethod
    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """Improve `task.model` in place, and return details for the report as JSON values."""


COMPENSATORS: Registry[Compensator] = registry.COMPENSATORS
