"""What a measure has to provide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...runtime.model_output import ModelOutput
from ...runtime.registry import MEASURES as MEASURES


class Measure(ABC):
    """A measure of the outputs of two models for the same images; an instance is used for one comparison.

    Attributes:
        name: The name in the registry, in results and in reports.
        label: What it is, in words; `title` where something less technical is wanted.
        kinds: The kinds of outputs that it suits, see `runtime.kinds`.
        form: How its values are written, and `unit` what follows them.
        good: From where on a result is good, and `usable` from where on it is usable; None for a measure that does not
            decide. Of several measures of a kind, the first that decides does.
        higher_is_better: Whether the largest value is that of equal outputs.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    title: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]]
    form: ClassVar[str] = ".4g"
    unit: ClassVar[str] = ""
    good: ClassVar[float | None] = None
    usable: ClassVar[float | None] = None
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def add(self, original: ModelOutput, output: ModelOutput, num_images: int) -> None:
        """Add the outputs of both models for a batch of so many images."""

    @abstractmethod
    def state(self) -> Any:
        """Return what this process has added, to be gathered."""

    @classmethod
    @abstractmethod
    def result(cls, states: Sequence[Any]) -> float | None:
        """Return the value over the states of all processes; NaN if it is not finite, None if it does not apply."""

    @classmethod
    def text(cls, value: float) -> str:
        """Return a value as it is shown."""
        return f"{value:{cls.form}}{cls.unit}"

    @classmethod
    def brief(cls, value: float) -> str:
        """Return a value with its name, as in a list of facts."""
        return f"{cls.label} {cls.text(value)}"

    @classmethod
    def sentence(cls, value: float, images: str) -> str:
        """Return a value on `256 held-out images` as the reason of a verdict; only of a measure that decides."""
        return f"{cls.label} {cls.text(value)} on {images}"

    @classmethod
    def word(cls, value: float) -> str:
        """Return `good`, `usable` or `broken`; only of a measure that decides."""
        assert cls.good is not None and cls.usable is not None
        sign = 1 if cls.higher_is_better else -1
        if sign * value >= sign * cls.good:
            return "good"
        return "usable" if sign * value >= sign * cls.usable else "broken"


class PairMeasure(Measure):
    """A measure with a value for every image, of which the result is the mean."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    @abstractmethod
    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """Return `[images]`; or, where features have a row for every token, `[tokens]`."""

    def add(self, original: ModelOutput, output: ModelOutput, num_images: int) -> None:
        """See `Measure.add`."""
        values = self.values(original, output).double()
        self._total += values.sum().item() * (num_images / len(values))
        self._count += num_images

    def state(self) -> tuple[float, int]:
        """See `Measure.state`."""
        return self._total, self._count

    @classmethod
    def result(cls, states: Sequence[tuple[float, int]]) -> float | None:
        """See `Measure.result`."""
        total, count = (sum(column) for column in zip(*states, strict=True))
        if not count:
            return None
        return total / count if math.isfinite(total) else math.nan


def mean_over(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of several `[images]`."""
    return torch.stack(list(values)).mean(dim=0)
