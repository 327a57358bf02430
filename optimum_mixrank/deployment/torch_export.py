"""Files of `torch.export`, which PyTorch runs without the code of the model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..runtime.registry import RUNTIMES
from .target import ExportedModel, Runtime, exported_program, named_precision


@RUNTIMES.register
class TorchExport(Runtime):
    """`torch.export`. Opening such a file can run code that it holds: open only files that you trust."""

    name: ClassVar[str] = "torch"
    file_name: ClassVar[str] = "model.pt2"
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    install: ClassVar[str] = "pip install torch"

    def write(self, model: nn.Module, pixel_values: Tensor, file: Path) -> None:
        """See `Runtime.write`."""
        torch.export.save(exported_program(model, pixel_values), file)

    def open(self, file: Path) -> ExportedModel:
        """See `Runtime.open`."""
        return _TorchModel(file)


class _TorchModel(ExportedModel):
    def __init__(self, file: Path) -> None:
        super().__init__()
        program = torch.export.load(file)
        weights = [each for each in program.state_dict.values() if each.ndim > 1]
        self.precision = named_precision(str(each.dtype).removeprefix("torch.") for each in weights)
        self.dtype = weights[0].dtype if weights and weights[0].is_floating_point() else torch.float32
        # Not a submodule: it has one mode alone, that of the export.
        self.program = (program.module(),)

    def run(self, pixel_values: Tensor) -> dict[str, Tensor]:
        output = self.program[0](pixel_values=pixel_values.to(self.dtype))
        return {name: value.float() for name, value in output.items() if isinstance(value, Tensor)}
