"""Runtimes that the benchmark of latency measures.

A new one is a function from a model and a batch to a call that processes the batch, with an entry in `RUNTIMES`. It is
given a model of its own, which it may change.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_mixrank import to_plain_factors
from optimum_mixrank.runtime.onnx_session import cpu_session


Call = Callable[[], Any]


def eager(model: nn.Module, pixel_values: torch.Tensor) -> Call:
    """PyTorch."""

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return model(pixel_values).logits

    return call


def compiled(model: nn.Module, pixel_values: torch.Tensor) -> Call:
    """PyTorch with `torch.compile`."""
    return eager(torch.compile(to_plain_factors(model), dynamic=False), pixel_values)


def onnxruntime(model: nn.Module, pixel_values: torch.Tensor) -> Call:
    """ONNX Runtime, pivoted layers exported as plain factors."""
    return onnxruntime_as_stored(to_plain_factors(model), pixel_values)


def onnxruntime_as_stored(model: nn.Module, pixel_values: torch.Tensor) -> Call:
    """ONNX Runtime, pivoted layers exported as they are stored."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            kwargs={"pixel_values": pixel_values[:1].expand(2, -1, -1, -1).contiguous()},
            f=file,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        session = cpu_session(file)
    images = pixel_values.numpy()
    return lambda: torch.from_numpy(session.run(["logits"], {"pixel_values": images})[0])


RUNTIMES: dict[str, Callable[[nn.Module, torch.Tensor], Call]] = {
    "PyTorch": eager,
    "torch.compile": compiled,
    "ONNX Runtime": onnxruntime,
    "ONNX Runtime, as stored": onnxruntime_as_stored,
}

_MODULES = {"ONNX Runtime": "onnxruntime", "ONNX Runtime, as stored": "onnxruntime"}


def available(names: list[str]) -> list[str]:
    """Those of these runtimes that are installed."""
    return [name for name in names if name not in _MODULES or importlib.util.find_spec(_MODULES[name])]


def prepared(name: str, model: nn.Module, pixel_values: torch.Tensor) -> Call:
    """A call of a runtime with a copy of a model; it has to agree with the model itself.

    Raises:
        RuntimeError: if it does not.
    """
    expected = eager(model, pixel_values)()
    call = RUNTIMES[name](copy.deepcopy(model), pixel_values)
    difference = (call() - expected).abs().max().item()
    if not difference < 1e-3 * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"{name} gives logits that differ from PyTorch's by up to {difference:.1e}.")
    return call
