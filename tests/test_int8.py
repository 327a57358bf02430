"""8-bit weights on top of a compression."""

import pytest
import torch
from models import compressed, pixels, tiny_deit, tiny_swin, tiny_vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from optimum_mixrank import FactoredLinear, to_dense
from optimum_mixrank.checkpoint.rank_map import LAYOUT_NAMES


pytestmark = pytest.mark.slow

FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}


@pytest.fixture(params=[(family, layout) for family in FAMILIES for layout in LAYOUT_NAMES], ids="-".join)
def checkpoint(request, tmp_path):
    family, layout = request.param
    compressed(FAMILIES[family](), layout).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options).eval()


def logits(model, count=4):
    with torch.no_grad():
        return model(pixel_values=pixels(count)).logits


def close(found, expected):
    """Within what rounding to 8 bits does to these small, strongly scaled models."""
    return (found - expected).norm() < 0.1 * expected.norm()


def factors(model):
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    return [factor for layer in layers for factor in (layer.factor_a, layer.factor_b)]


def test_torchao_quantizes_saves_and_loads(checkpoint, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    files = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = load(checkpoint)
    expected = logits(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert {type(factor.weight).__name__ for factor in factors(model)} == {"Int8Tensor"}
    quantized = logits(model)
    assert close(quantized, expected) and not torch.equal(quantized, expected)

    tensors, metadata = files.flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "int8.safetensors", metadata)
    with safe_open(tmp_path / "int8.safetensors", "pt") as file:
        metadata = file.metadata()
    state, _ = files.unflatten_tensor_state_dict(load_file(tmp_path / "int8.safetensors"), metadata)
    reloaded = load(checkpoint)
    reloaded.load_state_dict(state, assign=True)
    assert torch.equal(logits(reloaded), quantized)
    with pytest.raises(ValueError, match=r"Int8Tensor, .*make a model dense before it is quantized"):
        to_dense(model)


def test_onnx_runtime_runs_any_batch_in_float32_and_int8(checkpoint, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from onnxruntime.quantization import quantize_dynamic

    # With fused attention PyTorch 2.13 cannot export a Swin of Transformers 5.23, be it dense or compressed.
    model = load(checkpoint, attn_implementation="eager")
    torch.onnx.export(
        model,
        f=tmp_path / "full.onnx",
        kwargs={"pixel_values": pixels(2)},
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=False,
    )
    quantize_dynamic(tmp_path / "full.onnx", tmp_path / "int8.onnx", op_types_to_quantize=["MatMul", "Gemm"])

    def run(name, count):
        session = runtime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"pixel_values": pixels(count).numpy()})[0])

    for count in (1, 5):
        expected = logits(model, count)
        torch.testing.assert_close(run("full.onnx", count), expected, atol=1e-4, rtol=1e-4)
        assert close(run("int8.onnx", count), expected)
