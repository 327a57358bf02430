"""What a compensator is, and the registry of compensators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..decomposition import LayerStatistics
from ..distributed import ALONE, Processes
from ..journal import NO_JOURNAL, Journal
from ..layout import FactoredLayer
from ..memory_plan import KEPT_OUTPUTS
from ..outputs import ModelOutput
from ..registry import Registry
from ..targets import Target


if TYPE_CHECKING:
    from ..configuration import MixRankConfig
    from .photographs import Photographs


@dataclass
class Compensation:
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
        kept_outputs: Most bytes of the original's outputs that may be kept rather than computed again.
        spills: Whether activations of all images are to lie on the disk.
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
    processes: Processes = ALONE
    numbers: Sequence[int] = ()
    kept_outputs: int = KEPT_OUTPUTS
    spills: bool = False
    journal: Journal = NO_JOURNAL
    photographs: Photographs | None = None

    def all_images(self) -> Tensor:
        """The images to learn from, of all processes, in the order of their batches; every process calls this."""
        if self.processes.is_alone:
            return torch.cat(list(self.batches))
        return torch.cat(list(self.processes.collect(dict(zip(self.numbers, self.batches, strict=True))).values()))

    def all_photographs(self) -> Tensor | None:
        """The same in more detail, float16; None where there are none."""
        if self.photographs is None:
            return None
        own = self.photographs.decode()
        return torch.cat(list((own if self.processes.is_alone else self.processes.collect(own)).values()))

    def all_held_out(self) -> Tensor:
        """The same of the held-out images, in an order of its own."""
        if self.processes.is_alone:
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
        uses_photographs: Whether it draws views from `task.photographs`; only a compensator that shares images may.
    """

    name: ClassVar[str]
    shares_images: ClassVar[bool] = False
    uses_photographs: ClassVar[bool] = False

    @abstractmethod
    def compensate(self, task: Compensation) -> Mapping[str, Any]:
        """Improve `task.model` in place.

        Returns:
            Details for the report, JSON values.
        """


COMPENSATORS: Registry[Compensator] = Registry("compensation")
