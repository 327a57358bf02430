"""What every runtime promises: the same logits as PyTorch for batches of any size, and int8 that is close to them."""

import pytest
import torch
from models import mixed, pixels, tiny_deit, tiny_swin, tiny_vit
from transformers import ViTModel

from optimum_mixrank import export_model, open_exported, verify_model
from optimum_mixrank.calibration.images.batches import Batch


NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch", "transformers.exporters"),
    "torch": (),
}
FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}
SIZES = (1, 2, 5)


def required(runtime, *others):
    for module in (*NEEDS[runtime], *others):
        pytest.importorskip(module)


def batches(count=SIZES):
    return [Batch(pixels(size, seed=size)) for size in count]


@pytest.mark.parametrize(
    ("family", "runtime"),
    [
        *(("vit", "onnx"), ("swin", "onnx"), ("vit", "openvino"), ("vit", "torch")),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("deit", "onnx"), ("swin", "openvino"))),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("deit", "openvino"), ("swin", "torch"))),
    ],
)
def test_logits_are_those_of_pytorch(family, runtime, tmp_path):
    required(runtime)
    structured = mixed(FAMILIES[family](), "pivoted").eval()
    result = export_model(structured, tmp_path / "out", runtime)
    exported = open_exported(tmp_path / "out")
    found = verify_model(structured, exported, batches())
    assert found.is_ok and found.max_difference < 1e-4 and found.precision == "float32", found
    assert exported.batch_size is None and list(exported(pixels(1))) == ["logits"]
    weights = 4 * sum(parameter.numel() for parameter in structured.parameters())
    assert weights < result.num_bytes < weights + 400_000


@pytest.mark.slow
def test_executorch_agrees(tmp_path):
    required("executorch")
    model = mixed(tiny_vit(), "pivoted").eval()
    export_model(model, tmp_path / "out", "executorch")
    found = verify_model(model, open_exported(tmp_path / "out"), batches())
    assert found.is_ok, found


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_with_and_without_images(runtime, tmp_path):
    required(runtime, *(("nncf",) if runtime == "openvino" else ()))
    # Large enough for weights to outweigh the description of the graph.
    model = mixed(tiny_vit(hidden_size=128, intermediate_size=256), "pivoted").eval()
    full = export_model(model, tmp_path / "full", runtime)
    for name, images in {"dynamic": None, "static": [pixels(8, seed=7), pixels(8, seed=8)]}.items():
        result = export_model(model, tmp_path / name, runtime, int8=True, calibration=images)
        assert result.num_bytes < 0.75 * full.num_bytes and "weights" in result.quantized
        exported = open_exported(result.file)
        assert exported.precision == "int8"
        with torch.no_grad():
            expected = model(pixel_values=pixels(5)).logits
        error = (exported(pixels(5))["logits"] - expected).norm() / expected.norm()
        # Random weights make few classes stand out, and ranges of activations wide.
        assert 0 < error < {"dynamic": 0.15, "static": 0.4}[name], (name, error)


def test_encoders_give_all_their_outputs(tmp_path):
    required("onnx")
    encoder = tiny_vit(ViTModel).eval()
    export_model(encoder, tmp_path / "out", "onnx")
    exported = open_exported(tmp_path / "out")
    assert list(exported(pixels(3))) == ["last_hidden_state", "pooler_output"]
    assert verify_model(encoder, exported, batches()).is_ok
