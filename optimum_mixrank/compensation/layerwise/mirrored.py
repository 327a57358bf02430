"""Every image and its mirror image, without memory for the latter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WithMirrored:
    """Batches, and behind them the same mirrored, made anew whenever they are asked for.

    Attributes:
        batches: Each `[batch, channels, height, width]`.
    """

    batches: Sequence[Tensor]

    def __len__(self) -> int:
        """Twice the number of batches."""
        return 2 * len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        """A batch, by its number from 0."""
        count = len(self.batches)
        return self.batches[index] if index < count else self.batches[index - count].flip(-1)

    def __iter__(self) -> Iterator[Tensor]:
        """The batches one after the other."""
        return (self[index] for index in range(len(self)))
