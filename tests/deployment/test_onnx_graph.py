import numpy as np
import pytest


onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402

from optimum_mixrank.deployment.onnx_graph import store_weights_in_8_bits  # noqa: E402


RNG = np.random.default_rng(0)
SHAPES = {"A": (40, 64), "C": (64, 40), "D": (40, 48), "G": (56, 48)}


@pytest.fixture
def file(tmp_path):
    """The file of `relu(relu((x A + bias) C) D) Gᵀ`, in which C is stored transposed, and its stored weights."""
    weights = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights |= {"bias": RNG.standard_normal(64).astype(np.float32)}
    weights["C"] = np.ascontiguousarray(weights["C"].T)
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["u"], name="first"),
        helper.make_node("Add", ["u", "bias"], ["v"]),
        helper.make_node("Transpose", ["C"], ["Ct"], perm=[1, 0]),
        helper.make_node("MatMul", ["v", "Ct"], ["w"], name="second"),
        helper.make_node("Relu", ["w"], ["h"]),
        helper.make_node("MatMul", ["h", "D"], ["k"], name="dense"),
        helper.make_node("Relu", ["k"], ["l"]),
        helper.make_node("Gemm", ["l", "G"], ["y"], name="head", transB=1),
    ]
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", floats, ["batch", 40])],
        [helper.make_tensor_value_info("y", floats, ["batch", 56])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx", weights


def test_weights_are_rounded_per_output_channel(file):
    path, weights = file
    before = path.stat().st_size
    store_weights_in_8_bits(path)
    onnx.checker.check_model(str(path), full_check=True)
    assert path.stat().st_size < 0.4 * before

    def rounded(W, axis):
        scale = np.abs(W).max(axis=1 - axis, keepdims=True) / 127
        return np.round(W / scale) * scale

    x = RNG.standard_normal((3, 40)).astype(np.float32)
    h = np.maximum((x @ rounded(weights["A"], 1) + weights["bias"]) @ rounded(weights["C"], 0).T, 0)
    expected = np.maximum(h @ rounded(weights["D"], 1), 0) @ rounded(weights["G"], 0).T
    options = runtime.SessionOptions()
    # With more, ONNX Runtime rounds the inputs of such products too.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-2)
