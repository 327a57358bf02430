"""Sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch


ERRORS_ONLY = 3
"""The level of ONNX Runtime's log from which on it reports."""


def cpu_session(model: str | os.PathLike[str] | bytes) -> Any:
    """Return an `InferenceSession` on the CPU with as many threads as PyTorch has.

    Args:
        model: A file in ONNX format, or its contents.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    source = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
