"""ExecuTorch, for phones and small devices, through the exporter of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..runtime.registry import RUNTIMES
from .target import ExportedModel, Runtime


LARGEST_BATCH = 64
"""ExecuTorch plans its memory ahead, for batches of up to this size."""


@RUNTIMES.register
class ExecuTorchRuntime(Runtime):
    """ExecuTorch with the XNNPACK backend, written by `transformers.exporters`, which Transformers 5.23 brings."""

    name: ClassVar[str] = "executorch"
    file_name: ClassVar[str] = "model.pte"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    install: ClassVar[str] = "pip install executorch 'transformers>=5.23'"

    def write(self, model: nn.Module, pixel_values: Tensor, file: Path) -> None:
        """See `Runtime.write`; batches have up to `LARGEST_BATCH` images."""
        from transformers.exporters import ExecutorchConfig, ExecutorchExporter

        batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
        config = ExecutorchConfig(dynamic_shapes={"pixel_values": {0: batch}})
        exporter = ExecutorchExporter()
        with torch.no_grad():
            exported = exporter.export(model, {"pixel_values": pixel_values}, config)
        exporter.save_program(exported.program, file)

    def open(self, file: Path) -> ExportedModel:
        """See `Runtime.open`."""
        return _ExecuTorchModel(file)


class _ExecuTorchModel(ExportedModel):
    def __init__(self, file: Path) -> None:
        super().__init__()
        from executorch.runtime import Runtime as Loader

        self.program = Loader.get().load_program(file)
        self.method = self.program.load_method("forward")

    def run(self, pixel_values: Tensor) -> dict[str, Tensor]:
        # The outputs lie in memory that the next call overwrites, and have no names.
        outputs = self.method.execute([pixel_values.float().cpu().contiguous()])
        return {f"output_{index}": value.clone().float() for index, value in enumerate(outputs)}
