"""In which precision products of float32 tensors are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def to_float64(tensor: Tensor) -> Tensor:
    """The values of a tensor in float64, on its device where that knows float64, else on the host."""
    # Apple's GPUs have no float64.
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What Accelerate's names of mixed precision stand for."""

_leave = ContextVar("leave", default=False)


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 tensors in float32, whatever autocast and PyTorch's settings of TF32 say; see `tf32_statistics`.

    Args:
        device: Of the tensors.
    """
    with torch.autocast(device.type, enabled=False):
        if _leave.get():
            yield
            return
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            # Set by the newer of two interfaces, which the older one then refuses to describe.
            with _ieee_products():
                yield
            return
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def tf32_statistics(allowed: bool = True) -> Iterator[None]:
    """Let `float32_products` follow PyTorch's settings, so that statistics may be multiplied in TF32."""
    token = _leave.set(allowed)
    try:
        yield
    finally:
        _leave.reset(token)


@contextmanager
def _ieee_products() -> Iterator[None]:
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            # What was inherited from a wider setting is to be inherited again.
            backend.fp32_precision = "none"
            if backend.fp32_precision != value:
                backend.fp32_precision = value
