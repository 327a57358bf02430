"""Modules as functions of one tensor, run by PyTorch as they are, compiled, or by ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.onnx_session import cpu_session


RUNTIMES = ("eager", "compile", "onnxruntime")
"""Eager PyTorch, `torch.compile`, and ONNX Runtime on the CPU."""


def check_runtime(runtime: str, device: torch.device) -> None:
    """Check that a runtime can be used here.

    Raises:
        ValueError: if it is unknown, or is ONNX Runtime and the model is not on the CPU.
        ImportError: if ONNX Runtime is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is unknown; choose one of {', '.join(map(repr, RUNTIMES))}.")
    if runtime != "onnxruntime":
        return
    if device.type != "cpu":
        raise ValueError(f"runtime='onnxruntime' is measured on the CPU, but the model is on {device.type!r}.")
    try:
        import onnx  # noqa: F401 - the exporter needs it
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"runtime='onnxruntime' needs {error.name}: `python -m pip install 'optimum-mixrank[export]'`."
        ) from error


def runnable(module: nn.Module, example: Tensor, runtime: str) -> Callable[[], Any]:
    """Return a function that runs a module in evaluation mode on an example; gradients are left to the caller.

    Args:
        module: Takes one tensor, and returns a tensor or a tuple of them.
        example: Its input.
        runtime: One of `RUNTIMES`.
    """
    if runtime == "onnxruntime":
        return _onnxruntime(module, example)
    if runtime == "compile":
        return partial(_compiled(module), example)
    return partial(module, example)


def _compiled(module: nn.Module) -> Callable[[Tensor], Any]:
    def forward(input: Tensor) -> Any:
        return module(input)

    # Programs are kept by code object, and after a few for the same one PyTorch compiles no further.
    forward.__code__ = forward.__code__.replace()
    return torch.compile(forward, dynamic=False)


def _onnxruntime(module: nn.Module, example: Tensor) -> Callable[[], Any]:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter takes ten times as long, which adds up over hundreds of small modules.
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), file, input_names=["input"], dynamo=False)
    session = cpu_session(file.getvalue())
    binding = session.io_binding()
    binding.bind_cpu_input("input", example.numpy())
    for output in session.get_outputs():
        # Outputs stay where they are computed.
        binding.bind_output(output.name)
    return partial(session.run_with_iobinding, binding)
