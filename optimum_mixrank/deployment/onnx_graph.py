"""Products of an ONNX graph, and weights that are stored in 8 bits while their products compute in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


PRODUCTS = ("MatMul", "Gemm")
_WEIGHTED = (*PRODUCTS, "Conv")
_FEWEST_VALUES = 1024
"""Smaller weights are not worth the nodes that they would need."""


def store_weights_in_8_bits(file: str | Path) -> None:
    """Store the weights of all products and convolutions that compute in float32 in 8 bits, in place.

    Each output channel has a scale, `max |w| / 127`; a `DequantizeLinear` before the product restores float32.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(file)
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    inserted = []
    for name, axis in dict(_stored_weights(graph, weights.keys())).items():
        values = numpy_helper.to_array(weights[name])
        if values.dtype != np.float32 or values.size < _FEWEST_VALUES:
            continue
        others = tuple(each for each in range(values.ndim) if each != axis)
        scale = np.abs(values).max(axis=others, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1
        rounded = np.round(values / scale).astype(np.int8)
        graph.initializer.remove(weights[name])
        graph.initializer.append(numpy_helper.from_array(rounded, f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale.reshape(-1), f"{name}_scale"))
        inserted.append(helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=axis))
    # A node comes before those that need its output.
    for node in reversed(inserted):
        graph.node.insert(0, node)
    # Weights of more than 2 GB were beside the file, and stay there.
    beside = Path(file).with_name(f"{Path(file).name}.data")
    external = beside.exists()
    beside.unlink(missing_ok=True)
    onnx.save(model, file, save_as_external_data=external, location=beside.name)


def _stored_weights(graph: Any, names: Any) -> Iterator[tuple[str, int]]:
    """Return the weights in float32 products, each with its axis of output channels."""
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        found = _weight(node.input[1], makers, names) if node.op_type in _WEIGHTED else None
        if found is None:
            continue
        name, is_transposed = found
        last_is_output = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not any(each.name == "transB" and each.i for each in node.attribute)
        )
        yield name, int(last_is_output != is_transposed)


def _weight(name: str, makers: dict[str, Any], weights: Any) -> tuple[str, bool] | None:
    """Return the initializer that a product multiplies by, and whether it is transposed on the way."""
    is_transposed = False
    while name not in weights:
        node = makers.get(name)
        if node is None or node.op_type not in ("Transpose", "Identity"):
            return None
        is_transposed ^= node.op_type == "Transpose"
        name = node.input[0]
    return name, is_transposed
