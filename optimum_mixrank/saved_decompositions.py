"""Decompositions of layers in the journal, a few per entry, where they take longer than an interval."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from .decomposition import Decomposition
from .journal import Journal, flatten, unflatten


class SavedDecompositions:
    """What one process has decomposed.

    Args:
        journal: Where to save it.
        devices: Of the layers, by name.
    """

    def __init__(self, journal: Journal, devices: Mapping[str, torch.device]) -> None:
        self._journal = journal.part("decompositions")
        self._devices = devices
        self._entries = 0
        self._new: dict[str, Decomposition] = {}

    def load(self) -> dict[str, Decomposition]:
        """All that was saved, by name of the layer."""
        found: dict[str, Decomposition] = {}
        for number in itertools.count():
            entry = self._journal.load(f"{number}")
            if entry is None:
                self._entries = number
                return found
            for name, parts in unflatten(entry.tensors).items():
                found[name] = Decomposition(**parts).to(self._devices[name])
        raise AssertionError  # counting has no end

    def add(self, name: str, decomposition: Decomposition) -> None:
        """Take in one more layer; save all that are not yet saved if the last time is long enough ago."""
        if not self._journal.is_kept:
            return
        self._new[name] = decomposition
        if self._journal.due():
            self._save()

    def finish(self) -> None:
        """Save the rest, if decomposing took so long that it is worth it."""
        if self._entries and self._new:
            self._save()

    def _save(self) -> None:
        tensors = flatten({name: vars(decomposition) for name, decomposition in self._new.items()})
        self._journal.save(f"{self._entries}", tensors)
        self._entries += 1
        self._new.clear()
