"""What a compensator is, and the registry of compensators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoint.names import Target
from ..checkpoint.rank_map import FactoredLayer
from ..decomposition import LayerStatistics
from ..runtime import registry
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.journal import NO_JOURNAL, Journal
from ..runtime.outputs import ModelOutput
from ..runtime.registry import Registry


if TYPE_CHECKING:
    from ..checkpoint.configuration import MixRankConfig
    from .training.high_resolution import HighResolutionImages


MAX_CACHED_OUTPUT_BYTES = 4 * 2**30
"""Up to which layer-wise compensation keeps the original's outputs rather than computing them again."""


@dataclass(frozen=True)
class ActivationStorage:
    """Where layer-wise steps hold the activations of all images.

    Attributes:
        max_output_bytes: Up to which outputs of the original are kept rather than computed again.
        on_disk: Whether the inputs of blocks lie on the disk rather than in memory.
    """

    max_output_bytes: int = MAX_CACHED_OUTPUT_BYTES
    on_disk: bool = False


IN_MEMORY = ActivationStorage()


@dataclass
class CompensationTask:
    """What a compensator works on.

    Attributes:
        original: The original model; it is not changed.
        model: The compressed model, in evaluation mode; it is improved in place, and takes no more values.
        targets: The targeted layers of the original.
        rank_map: The factored layers, by canonical name.
        statistics: Calibration statistics by module name; empty for a metric without data.
        batches: Calibration images as `pixel_values`, each `[batch, channels, height, width]`, for learning.
        held_out: The same of images that nothing is learned from; they decide what is kept.
        references: Outputs of the original on the held-out images.
        config: The configuration.
        processes: Those that share the images out: batches, held-out images and references are the share of this one.
        numbers: Of `batches` among those of all processes, ascending; not needed for one process.
        storage: Where activations are held.
        journal: Where a compensator may note how far it is, and finds it when the run goes on.
        photographs: The images of `batches` in more detail; None where there are none.
    """

    original: nn.Module
    model: nn.Module
    targets: Sequence[Target]
    rank_map: Mapping[str, FactoredLayer]
    statistics: Mapping[str, LayerStatistics]
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    references: Sequence[ModelOutput]
    config: MixRankConfig
    processes: Processes = SINGLE_PROCESS
    numbers: Sequence[int] = ()
    storage: ActivationStorage = IN_MEMORY
    journal: Journal = NO_JOURNAL
    high_resolution: HighResolutionImages | None = None

    def all_images(self) -> Tensor:
        """The images to learn from, of all processes, in the order of their batches; every process calls this."""
        if self.processes.is_single:
            return torch.cat(list(self.batches))
        return torch.cat(list(self.processes.collect(dict(zip(self.numbers, self.batches, strict=True))).values()))

    def all_high_resolution(self) -> Tensor | None:
        """The same in more detail, float16; None where there are none."""
        if self.high_resolution is None:
            return None
        own = self.high_resolution.decode()
        return torch.cat(list((own if self.processes.is_single else self.processes.collect(own)).values()))

    def all_held_out(self) -> Tensor:
        """The same of the held-out images, in an order of its own."""
        if self.processes.is_single:
            return torch.cat(list(self.held_out))
        own = range(self.processes.index, self.processes.count * len(self.held_out), self.processes.count)
        return torch.cat(list(self.processes.collect(dict(zip(own, self.held_out, strict=True))).values()))

    @property
    def factored(self) -> list[Target]:
        """The targets that are factored, in forward order."""
        return [target for target in self.targets if target.canonical_name in self.rank_map]


@dataclass(frozen=True)
class CompensationResult:
    """What came of a compensator, for the report.

    Attributes:
        name: Of the compensator.
        kept: Whether its outcome was kept; if not, the model is as it was before.
        error_before: Error on the held-out images before, KL in nats per image, or relative error of the features of
            models without a class head.
        error_after: The same afterwards.
        details: JSON values.
    """

    name: str
    kept: bool
    error_before: float
    error_after: float
    details: Mapping[str, Any] = field(default_factory=dict)


class Compensator(ABC):
    """Repairs what a compression has broken, without labels.

    Attributes:
        name: Entry of `MixRankConfig.compensation`.
        shares_images: Whether it works on the share of the images that its process has, and exchanges what it finds by
            `task.processes`. If not, every process gets all images and does the same work.
        uses_photographs: Whether it draws views from `task.high_resolution`; only a compensator that shares images may.
        starts_anew: Whether it makes every layer anew from the original, so that it has to be the first step.
    """

    name: ClassVar[str]
    shares_images: ClassVar[bool] = False
    uses_high_resolution: ClassVar[bool] = False
    starts_anew: ClassVar[bool] = False

    @abstractmethod
    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """Improve `task.model` in place.

        Returns:
            Details for the report, JSON values.
        """


COMPENSATORS: Registry[Compensator] = registry.COMPENSATORS
