"""How far a calibration pass is, in the journal, so that it goes on from there bit by bit as if nothing had happened."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..distributed import Processes
from ..journal import Journal
from .fisher import GradientCollector
from .images import ImageBatches


if TYPE_CHECKING:
    from .collect import StatisticsCollector


Item = TypeVar("Item")

_NAME = "calibration"


class SavedPass:
    """What one process has taken in during a pass.

    Args:
        journal: Where to save it.
        collector: Of the forward passes.
        gradients: Of the backward passes, or None.
        batches: What the pass goes over.

    Attributes:
        images: Their number so far.
        batches: Their number so far.
    """

    def __init__(
        self,
        journal: Journal,
        collector: StatisticsCollector,
        gradients: GradientCollector | None,
        batches: Iterable[object],
    ) -> None:
        self.images = 0
        self.batches = 0
        self._journal = journal
        self._collector = collector
        self._gradients = gradients
        self._source = batches if isinstance(batches, ImageBatches) else None

    def resume(self, processes: Processes, device: torch.device) -> bool:
        """Take over what was saved, in all processes or in none: part of the batches would not do.

        Returns:
            Whether there was anything.
        """
        with processes.agreed():
            entry = self._journal.load(_NAME)
        if not all(processes.gather(entry is not None)) or entry is None:
            return False
        self.images, self.batches = entry.values["images"], entry.values["batches"]
        self._collector.resume(_part(entry.tensors, "statistics"), entry.values["statistics"], device)
        if self._gradients is not None:
            self._gradients.load_state_dict(_part(entry.tensors, "gradients"), device)
        if self._source is not None:
            self._source.resume(_part(entry.tensors, "source"), entry.values["source"])
        return True

    def rest(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Those that have not been taken in."""
        # `ImageBatches` does not load them at all.
        return itertools.islice(batches, 0 if self._source is not None else self.batches, None)

    def save(self) -> None:
        """Save what has been taken in."""
        if not self._journal.is_kept:
            return
        statistics, values = self._collector.state()
        parts = {"statistics": statistics}
        content = {"images": self.images, "batches": self.batches, "statistics": values}
        if self._gradients is not None:
            parts["gradients"] = self._gradients.state_dict()
        if self._source is not None:
            parts["source"], content["source"] = self._source.state()
        tensors = {f"{part}|{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        self._journal.save(_NAME, tensors, content)

    def save_when_due(self) -> None:
        """Save it if the last time is long enough ago."""
        if self._journal.due():
            self.save()


def forget_pass(journal: Journal) -> None:
    """Remove what was saved of a pass that has come to its end."""
    journal.remove(_NAME)


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}|"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}|")}
