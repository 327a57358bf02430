"""Where a forward pass spends its time, by kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


KINDS = {
    "products": (
        "addmm",
        "mm",
        "bmm",
        "linear",
        "matmul",
        "t",
        "transpose",
        "view",
        "reshape",
        "as_strided",
        "expand",
    ),
    "attention": ("scaled_dot_product", "softmax"),
    "reordering": ("index_select", "gather", "cat", "eye", "zeros", "arange", "fill_", "zero_"),
    "activations": ("gelu", "silu", "mul", "relu"),
    "norms and sums": ("layer_norm", "add", "add_"),
}
"""Beginnings of the names of operations; what begins with none of them is `other`."""


def milliseconds_by_kind(call: Callable[[], Any], passes: int = 10) -> dict[str, float]:
    """Time of one pass by kind of operation, in milliseconds of the processor; views count with the products they serve."""
    for _ in range(2):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(passes):
            call()
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        found[_kind(event.key)] += event.self_cpu_time_total / 1000 / passes
    return found


def _kind(name: str) -> str:
    operation = name.removeprefix("aten::")
    for kind, names in KINDS.items():
        if operation in names or operation.removeprefix("_").removeprefix("native_").startswith(
            tuple(each for each in names if len(each) > 4)
        ):
            return kind
    return "other"
