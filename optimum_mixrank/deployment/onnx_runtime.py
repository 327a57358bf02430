"""ONNX files, and ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.onnx_session import cpu_session
from ..runtime.registry import RUNTIMES
from .onnx_graph import PRODUCTS, store_weights_in_8_bits
from .target import ExportedModel, Runtime, named_precision, output_names


_INPUT_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


@RUNTIMES.register
class OnnxRuntime(Runtime):
    """ONNX, written by `torch.onnx.export` and quantized by `onnxruntime.quantization`."""

    name: ClassVar[str] = "onnx"
    file_name: ClassVar[str] = "model.onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    install: ClassVar[str] = "pip install 'optimum-mixrank[export]'"

    def write(self, model: nn.Module, pixel_values: Tensor, file: Path) -> None:
        """See `Runtime.write`."""
        names = output_names(model, pixel_values)
        # With gradients, a position bias that is trainable makes PyTorch trace another attention kernel than it then
        # decomposes: a Swin would not be exported.
        with torch.no_grad(), _torchvision_not_missed():
            program = torch.onnx.export(
                model,
                kwargs={"pixel_values": pixel_values},
                dynamo=True,
                input_names=["pixel_values"],
                output_names=names,
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        # Weights of more than 2 GB go to a file of their own, `model.onnx.data`.
        program.save(file)
        strip_metadata(file)

    def open(self, file: Path) -> ExportedModel:
        """See `Runtime.open`."""
        return _OnnxModel(file)

    def quantize(self, file: Path, target: Path, batches: Iterable[Tensor] | None) -> str:
        """See `Runtime.quantize`; with images, activations get fixed ranges, otherwise those of each call.

        The patch embedding only has weights that are stored in 8 bits.
        """
        from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

        options = {
            "per_channel": True,
            "weight_type": QuantType.QInt8,
            "use_external_data_format": _is_large(file),
            "op_types_to_quantize": list(PRODUCTS),
        }
        with _root_logger_left_alone():
            if batches is None:
                quantize_dynamic(file, target, **options)
            else:
                quantize_static(file, target, _Images(batches), extra_options={"MatMulConstBOnly": True}, **options)
        store_weights_in_8_bits(target)
        strip_metadata(target)
        return "weights, and activations in each call" if batches is None else "weights and activations"


def strip_metadata(file: str | Path) -> None:
    """Remove from an ONNX file what no runtime reads, in place; weights in a file beside it stay there.

    `torch.onnx.export` records with every node the stack trace of the Python code that it comes from, with paths of the
    machine, which makes small int8 files larger than float32 ones; and the shapes of intermediate values, which
    runtimes infer themselves.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    del model.metadata_props[:]
    model.doc_string = ""
    for graph in (model.graph, *model.functions):
        del graph.value_info[:]
        for part in (graph, *graph.node):
            del part.metadata_props[:]
            part.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    onnx.save(model, file)


class _OnnxModel(ExportedModel):
    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnx

        weights = onnx.load(file, load_external_data=False).graph.initializer
        self.precision = named_precision(
            onnx.TensorProto.DataType.Name(each.data_type) for each in weights if len(each.dims) > 1
        )
        self.session = cpu_session(file)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _INPUT_TYPES:
            found = ", ".join(f"{each.name} {each.type}" for each in inputs)
            raise ValueError(f"{str(file)!r} takes {found}; a model for images takes pixel values alone.")
        self.input, self.dtype = inputs[0].name, _INPUT_TYPES[inputs[0].type]
        self.batch_size = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
        self.names = [output.name for output in self.session.get_outputs()]

    def run(self, pixel_values: Tensor) -> dict[str, Tensor]:
        values = self.session.run(self.names, {self.input: pixel_values.to("cpu", self.dtype).numpy()})
        return {name: torch.from_numpy(value).float() for name, value in zip(self.names, values, strict=True)}


@contextmanager
def _torchvision_not_missed() -> Iterator[None]:
    """Keep PyTorch from warning of operators of torchvision, which models of Transformers do without."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def concerns_us(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger.addFilter(concerns_us)
    try:
        yield
    finally:
        logger.removeFilter(concerns_us)


@contextmanager
def _root_logger_left_alone() -> Iterator[None]:
    """Keep ONNX Runtime from printing advice for graphs of other exporters, and from giving the root logger a handler."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Images:
    """Batches in the form in which `quantize_static` asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixel_values": batch.float().numpy()}


def _is_large(file: Path) -> bool:
    """Return whether weights are in a file beside this one."""
    return file.with_name(f"{file.name}.data").exists()
