"""OpenVINO's intermediate representation, `openvino_model.xml` with its weights in `openvino_model.bin`."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.logging import is_progress_bar_enabled

from ..runtime.registry import RUNTIMES
from .target import ExportedModel, Runtime, exported_program, named_precision, output_names


@RUNTIMES.register
class OpenVinoRuntime(Runtime):
    """OpenVINO, converted from what `torch.export` gives and quantized by NNCF."""

    name: ClassVar[str] = "openvino"
    file_name: ClassVar[str] = "openvino_model.xml"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    install: ClassVar[str] = "pip install 'optimum-mixrank[openvino]'"

    def write(self, model: nn.Module, pixel_values: Tensor, file: Path) -> None:
        """See `Runtime.write`."""
        import openvino

        names = output_names(model, pixel_values)
        converted = openvino.convert_model(exported_program(model, pixel_values))
        converted.inputs[0].get_tensor().set_names({"pixel_values"})
        for output, name in zip(converted.outputs, names, strict=True):
            output.get_tensor().set_names({name})
        openvino.save_model(converted, file, compress_to_fp16=False)

    def open(self, file: Path) -> ExportedModel:
        """See `Runtime.open`."""
        return _OpenVinoModel(file)

    def quantize(self, file: Path, target: Path, batches: Iterable[Tensor] | None) -> str:
        """See `Runtime.quantize`; without images, activations stay in float32."""
        self.check_packages(["nncf"])
        import nncf
        import openvino

        model = openvino.Core().read_model(file)
        images = None if batches is None else [image.float().numpy()[None] for batch in batches for image in batch]
        with _stdout_left_alone():
            if images is None:
                quantized = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
            else:
                quantized = nncf.quantize(
                    model, nncf.Dataset(images), subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER
                )
        openvino.save_model(quantized, target, compress_to_fp16=False)
        return "weights" if batches is None else "weights and activations"


@contextmanager
def _stdout_left_alone() -> Iterator[None]:
    """Put what NNCF prints to stderr, since stdout is for results; nowhere if progress bars are not wanted."""
    shown, logger = sys.stderr if is_progress_bar_enabled() else io.StringIO(), logging.getLogger("nncf")
    # They write to what was stdout when NNCF was imported.
    handlers = logger.handlers
    logger.handlers = [logging.StreamHandler(shown)]
    try:
        with redirect_stdout(shown):
            yield
    finally:
        logger.handlers = handlers


class _OpenVinoModel(ExportedModel):
    def __init__(self, file: Path) -> None:
        super().__init__()
        import openvino

        core = openvino.Core()
        model = core.read_model(file)
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        self.precision = named_precision(
            node.get_element_type().get_type_name() for node in constants if len(node.get_output_shape(0)) > 1
        )
        if len(model.inputs) != 1:
            found = ", ".join(each.any_name for each in model.inputs)
            raise ValueError(f"{str(file)!r} takes {found}; a model for images takes pixel values alone.")
        size = model.inputs[0].partial_shape[0]
        self.batch_size = None if size.is_dynamic else size.get_length()
        # Where the processor has bfloat16, OpenVINO would compute in that.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = core.compile_model(model, "CPU", settings)
        self.names = [output.any_name for output in self.compiled.outputs]

    def run(self, pixel_values: Tensor) -> dict[str, Tensor]:
        values = self.compiled([pixel_values.float().cpu().numpy()]).values()
        return {name: torch.from_numpy(value.copy()) for name, value in zip(self.names, values, strict=True)}
