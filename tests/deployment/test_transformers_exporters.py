"""The exporters of Transformers 5.23 take compressed models as they are."""

import pytest
import torch
from models import mixed, pixels, tiny_swin, tiny_vit


pytestmark = pytest.mark.slow

exporters = pytest.importorskip("transformers.exporters")


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
@pytest.mark.parametrize(("name", "package"), [("Onnx", "onnxruntime"), ("OpenVINO", "openvino")])
def test_logits_are_those_of_pytorch(build, name, package):
    pytest.importorskip(package)
    model = mixed(build(), "pivoted").eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    config = getattr(exporters, f"{name}Config")(dynamic_shapes=shapes)
    exported = getattr(exporters, f"{name}Exporter")().export(model, {"pixel_values": pixels(2)}, config)
    if name == "OpenVINO":
        # Where the processor has bfloat16, OpenVINO would compute in that.
        exported.to(config={"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 5):
        with torch.no_grad():
            expected = model(pixel_values=pixels(count)).logits
        torch.testing.assert_close(exported(pixel_values=pixels(count)).logits, expected, atol=1e-4, rtol=1e-4)
