"""The reports of the models that a compressor has made, each with its own model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reporting import CompressionReport


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from .unfinished import UnfinishedRun

_SAMPLES = 8
"""Values per tensor by which a model that was saved and loaded again is recognized."""

_ROUNDING = 0.01
"""Relative difference up to which values are the same; bfloat16 rounds by 0.004."""


@dataclass
class Made:
    """A model that a compressor has made.

    Attributes:
        model: The model, unless it is gone.
        report: Its report.
        run: The unfinished run that is removed once the model is saved.
        values: Some of its values by name of the tensor, float64, on the CPU.
        folder: Where it was saved last; None before that.
    """

    model: weakref.ref[PreTrainedModel]
    report: CompressionReport
    run: UnfinishedRun | None
    values: dict[str, Tensor]
    folder: Path | None = None

    def saved(self, model: PreTrainedModel, report: CompressionReport, folder: Path) -> None:
        """Record that the model was saved as it is now, with a report to which its size on disk was added."""
        self.report, self.run, self.values, self.folder = report, None, _some_values(model), folder


@dataclass
class MadeModels:
    """The models that a compressor has made, the last one at the end."""

    _made: list[Made] = field(default_factory=list)

    @property
    def last(self) -> Made | None:
        """The last model, if there is one."""
        return self._made[-1] if self._made else None

    def add(self, model: PreTrainedModel, report: CompressionReport, run: UnfinishedRun | None) -> None:
        """Add a model. A folder of an unfinished run belongs to one model only, the last."""
        self._made = [made for made in self._made if made.model() is not model]
        self.leave(None if run is None else run.journal.directory)
        self._made.append(Made(weakref.ref(model), report, run, _some_values(model)))

    def leave(self, directory: Path | None) -> None:
        """Let go of the unfinished run in a folder, and of those whose models are gone and will never be saved."""
        for made in self._made:
            if made.run is not None and (made.model() is None or made.run.journal.directory == directory):
                made.run = None

    def find(self, model: PreTrainedModel) -> Made | None:
        """Return what is known of a model made here, which may also be a copy or loaded again; None for any other."""
        for made in reversed(self._made):
            if made.model() is model:
                return made
        values = _some_values(model)
        return next((made for made in reversed(self._made) if _are_same(made.values, values)), None)


def _some_values(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        # Tensors of other classes, such as quantized ones, are never made here, and cannot all be indexed.
        if type(tensor) is Tensor and tensor.numel() and not tensor.is_meta:
            last, count = tensor.numel() - 1, min(_SAMPLES, tensor.numel())
            # Integers, since floating-point numbers round the last place of large tensors beyond their end.
            places = torch.tensor([index * last // max(count - 1, 1) for index in range(count)], device=tensor.device)
            found[name] = tensor.detach().reshape(-1)[places].cpu().double()
    return found


def _are_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        values.shape == second[name].shape and torch.allclose(values, second[name], rtol=_ROUNDING, atol=1e-6)
        for name, values in first.items()
    )
