import logging

import pytest
import torch
from models import compressed, pixels, tiny_vit

from optimum_mixrank import export_model, open_exported, verify_model
from optimum_mixrank.calibration.images.batches import Batch


onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from optimum_mixrank.deployment.onnx_runtime import (  # noqa: E402
    _root_logger_left_alone,
    _torchvision_not_missed,
    strip_metadata,
)


@pytest.mark.parametrize("external", [False, True], ids=["one file", "weights beside it"])
def test_metadata_is_removed_and_nothing_else(tmp_path, external):
    model = compressed(tiny_vit(), "pivoted").eval()
    program = torch.onnx.export(model, kwargs={"pixel_values": pixels(2)}, dynamo=True, verbose=False)
    file = tmp_path / "model.onnx"
    program.save(file, external_data=external)
    before, text = file.stat().st_size, file.read_bytes()
    assert b"modeling_vit.py" in text
    strip_metadata(file)
    # Paths of this machine, and most of the bytes.
    assert b".py" not in file.read_bytes() and file.stat().st_size < before - 100_000
    assert (tmp_path / "model.onnx.data").exists() == external
    onnx.checker.check_model(str(file))
    exported = open_exported(file)
    # Exported without a dynamic size, it takes two images at a time.
    assert exported.batch_size == 2
    assert verify_model(model, exported, [Batch(pixels(5))]).is_ok


def test_a_model_with_other_inputs_is_refused(tmp_path):
    class Sum(torch.nn.Module):
        def forward(self, left, right):
            return left + right

    torch.onnx.export(Sum(), (pixels(1), pixels(1)), tmp_path / "sum.onnx", dynamo=True, verbose=False)
    with pytest.raises(ValueError, match=r"takes left tensor\(float\), right tensor\(float\); a model for images"):
        open_exported(tmp_path / "sum.onnx")


def test_included_layers_are_exported(tmp_path):
    # Patches of 192 values and 40 classes, so that factors are smaller.
    include = {"include": ["patch_embedding", "heads"], "ratio_pattern": {}}
    model = compressed(tiny_vit(num_labels=40), "pivoted", **include).eval()
    assert model.vit.embeddings.patch_embeddings.projection.linear.rank and model.classifier.rank
    file = export_model(model, tmp_path / "exported", "onnx").file
    assert verify_model(model, open_exported(file), [Batch(pixels(5))]).is_ok


def test_what_quantization_logs_to_the_root_logger_is_not_printed(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with _root_logger_left_alone():
        logging.warning("Please consider to run pre-processing before quantization.")
    assert not logging.getLogger().handlers and not capsys.readouterr().err


def test_a_missing_torchvision_is_not_reported(caplog):
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    with _torchvision_not_missed():
        logger.warning("torchvision is not installed. Skipping %s", "torchvision::nms")
        logger.warning("another warning")
    assert caplog.messages == ["another warning"]
    logger.warning("torchvision is not installed. Skipping %s", "torchvision::nms")
    assert len(caplog.messages) == 2
