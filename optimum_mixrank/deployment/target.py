"""What a runtime has to provide, and the exported models that it runs."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn


FLOAT32, HALF, INT8 = "float32", "half", "int8"
"""Precisions of a file, by the types of the weights that it holds."""


class ExportedModel(nn.Module, ABC):
    """A file of a runtime, called like the model it came from: `pixel_values` in, outputs by name out.

    A file that takes batches of one size only gets its images in batches of that size.

    Attributes:
        precision: `"float32"`, `"half"` or `"int8"`, by the types of the weights in the file.
        batch_size: The only number of images per call that the file takes; None if it takes any.
    """

    precision: str = FLOAT32
    batch_size: int | None = None

    @abstractmethod
    def run(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name for `[batch, channels, height, width]`, float32 on the CPU."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name for any number of images."""
        count, size = len(pixel_values), self.batch_size
        if size is None or size == count:
            return self.run(pixel_values)
        # The last images are repeated until they fill up a batch.
        missing = -count % size
        padded = torch.cat([pixel_values, pixel_values[-1:].expand(missing, *pixel_values.shape[1:])])
        parts = [self.run(part) for part in padded.split(size)]
        return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}


class Runtime(ABC):
    """A runtime that exported models are written for.

    Attributes:
        name: The name in the registry and on the command line.
        file_name: The file that a folder holds.
        packages: The packages that have to be installed.
        install: How to install them.
    """

    name: ClassVar[str]
    file_name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    install: ClassVar[str]

    @abstractmethod
    def write(self, model: nn.Module, pixel_values: Tensor, file: Path) -> None:
        """Write a model in evaluation mode, for batches of any size.

        Args:
            model: The model, on the CPU.
            pixel_values: Images to trace it with, `[2, channels, height, width]`.
            file: The file to write; files beside it have names that begin with its stem.
        """

    @abstractmethod
    def open(self, file: Path) -> ExportedModel:
        """Open a file, with as many threads as PyTorch uses."""

    def quantize(self, file: Path, target: Path, batches: Iterable[Tensor] | None) -> str:
        """Write a file with 8-bit weights.

        Args:
            file: What `write` has written.
            target: The file to write.
            batches: Images to calibrate activations with, `[batch, channels, height, width]` each; None leaves them as
                they are, or determines their range in each call.

        Returns:
            What was quantized, in words.

        Raises:
            ValueError: if there is no such thing for this runtime.
        """
        raise ValueError(f"runtime={self.name!r} has no int8 here; choose 'onnx' or 'openvino', or leave int8 out.")

    def check_packages(self, others: Iterable[str] = ()) -> None:
        """Check, before any work, that what the runtime needs is installed.

        Raises:
            ImportError: if it is not; the message says how to install it.
        """
        missing = [name for name in (*self.packages, *others) if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"runtime={self.name!r} needs {', '.join(missing)}: {self.install}")


def output_names(model: nn.Module, pixel_values: Tensor) -> list[str]:
    """Return the names of the tensors that a model returns, in their order.

    Raises:
        ValueError: if it returns something else besides.
    """
    with torch.no_grad():
        output = model(pixel_values=pixel_values)
    if not isinstance(output, Mapping) or not all(isinstance(value, Tensor) for value in output.values()):
        raise ValueError(
            f"This {type(model).__name__} returns more than tensors by name, which cannot be exported; load it without "
            "`output_hidden_states` and `output_attentions`."
        )
    return list(output)


def exported_program(model: nn.Module, pixel_values: Tensor) -> torch.export.ExportedProgram:
    """Return what `torch.export` makes of a model, for batches of any size."""
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(model, (), {"pixel_values": pixel_values}, dynamic_shapes=shapes)


def named_precision(types: Iterable[str]) -> str:
    """Return the precision of a file, given the names of the types of its weights, as in `INT8` or `f16`."""
    found = {name.lower() for name in types}
    if found & {"int8", "uint8", "i8", "u8"}:
        return INT8
    return HALF if found & {"float16", "bfloat16", "f16", "bf16"} else FLOAT32
