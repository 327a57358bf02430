"""In which precision tensors are multiplied and accumulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by Accelerate's names of mixed precision."""

_tf32_allowed = ContextVar("tf32_allowed", default=False)


def to_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, without gradients, on its own device if that supports float64, else on the CPU."""
    # Apple's GPUs have no float64.
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 tensors in float32 whatever autocast and, outside `tf32_statistics`, TF32 settings say."""
    with torch.autocast(device.type, enabled=False):
        if _tf32_allowed.get():
            yield
            return
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            # TF32 was enabled through PyTorch's newer interface, whose settings this older one refuses to describe.
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
    """Let `float32_products` follow PyTorch's settings, so that statistics may be computed in TF32."""
    token = _tf32_allowed.set(allowed)
    try:
        yield
    finally:
        _tf32_allowed.reset(token)


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
            # A value inherited from a wider setting has to be inherited again rather than set here.
            backend.fp32_precision = "none"
            if backend.fp32_precision != value:
                backend.fp32_precision = value
