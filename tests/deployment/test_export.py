import json

import pytest
import torch
from models import pixels, segformer
from transformers import AutoConfig, SegformerImageProcessor, ViTImageProcessor

from optimum_mixrank import FactoredLinear, LowRankLinear, PivotedLinear, export_model, open_exported
from optimum_mixrank.deployment.opening import find_exported


def test_a_folder_holds_the_model_and_its_configurations(one_model, plain_runtime, tmp_path):
    one_model.train()
    result = export_model(one_model, tmp_path / "out", "plain", image_processor=ViTImageProcessor())
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        *("model.plain", "model.plain.data", "config.json", "preprocessor_config.json")
    }
    assert result.file == tmp_path / "out" / "model.plain"
    assert (result.runtime, result.quantized, result.num_bytes) == ("plain", None, 3 + 7)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == one_model.config.num_labels
    # The model itself stays as it was.
    assert one_model.config.quantization_config.rank_map and one_model.training


def test_int8_with_and_without_images(one_model, plain_runtime, tmp_path):
    assert export_model(one_model, tmp_path / "a", "plain", int8=True).quantized == "0 images"
    images = iter([pixels(3), pixels(2)])
    assert export_model(one_model, tmp_path / "b", "plain", int8=True, calibration=images).quantized == "5 images"
    # The file in float32 is not left beside it.
    assert sorted(each.name for each in (tmp_path / "b").iterdir()) == ["config.json", "model.plain"]


@pytest.mark.parametrize("options", [{}, {"plain_factors": True}, {"int8": True}])
def test_layers_are_written_in_the_form_that_was_asked_for(one_model, plain_runtime, monkeypatch, tmp_path, options):
    written = []
    monkeypatch.setattr(plain_runtime, "write", lambda self, model, *_: written.append(model))
    monkeypatch.setattr(plain_runtime, "quantize", lambda *_: "all")
    export_model(one_model, tmp_path / "out", "plain", **options)
    layers = [each for each in written[0].modules() if isinstance(each, FactoredLinear)]
    kind = LowRankLinear if options else PivotedLinear
    assert layers and {type(each) for each in layers} == {kind}
    rotated = [torch.allclose(B.T @ B, torch.eye(B.shape[1]), atol=1e-5) for B in map(second_factor, layers)]
    assert set(rotated) == {options.get("int8", False)}
    assert any(isinstance(each, PivotedLinear) for each in one_model.modules())


def second_factor(layer):
    return layer.second_factor().detach()


def test_a_model_that_names_no_size_is_exported_for_the_one_given_or_that_of_its_processor(
    plain_runtime, monkeypatch, tmp_path
):
    shapes = []
    monkeypatch.setattr(
        plain_runtime, "write", lambda self, model, images, file: shapes.append(tuple(images.shape[1:]))
    )
    model, processor = segformer(), SegformerImageProcessor(size={"height": 64, "width": 32})
    with pytest.raises(ValueError, match="image_size=None, which is not an .*, or pass `pixel_values_shape=…`"):
        export_model(model, tmp_path / "none", "plain")
    export_model(model, tmp_path / "a", "plain", image_processor=processor)
    export_model(model, tmp_path / "b", "plain", image_processor=processor, pixel_values_shape=[3, 32, 96])
    assert shapes == [(3, 64, 32), (3, 32, 96)]
    with pytest.raises(ValueError, match=r"pixel_values_shape=\(3, 0, 96\) is not \(channels, height, width\)"):
        export_model(model, tmp_path / "c", "plain", pixel_values_shape=[3, 0, 96])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b"]


def test_an_image_processor_that_makes_another_size_is_noticed(plain_runtime, tmp_path, caplog):
    model, processor = segformer(), SegformerImageProcessor(size={"height": 64, "width": 32})
    export_model(model, tmp_path / "a", "plain", image_processor=processor, pixel_values_shape=[3, 64, 32])
    assert not caplog.records
    export_model(model, tmp_path / "b", "plain", image_processor=processor, pixel_values_shape=[3, 32, 96])
    assert "makes images of 3 x 64 x 32, but the exported model takes 3 x 32 x 96" in caplog.text


@pytest.mark.parametrize(
    ("images", "message"),
    [([torch.zeros(2, 3, 16, 32)], "are 3 x 16 x 32, but the file takes 3 x 32 x 32"), ([], "There are no images")],
)
def test_images_for_ranges_are_checked_before_anything_is_written(
    one_model, plain_runtime, monkeypatch, tmp_path, images, message
):
    monkeypatch.setattr(plain_runtime, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match=message):
        export_model(one_model, tmp_path / "out", "plain", int8=True, calibration=images)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_only_replaced_on_demand(one_model, plain_runtime, tmp_path):
    export_model(one_model, tmp_path, "plain")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        export_model(one_model, tmp_path, "plain", int8=True)
    assert (tmp_path / "model.plain").read_text() == "1.0"
    images = [pixels(2)]
    export_model(one_model, tmp_path, "plain", int8=True, calibration=images, overwrite=True)
    assert (tmp_path / "model.plain").read_text() == "3.0"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # It belonged to the earlier model.
    assert not (tmp_path / "model.plain.data").exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_the_folder_of_a_checkpoint_is_refused(one_model, plain_runtime, tmp_path, weights):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / weights).write_bytes(b"weights of somebody")
    with pytest.raises(FileExistsError, match=f"holds a checkpoint \\({weights}\\), whose config.json"):
        export_model(one_model, tmp_path, "plain", overwrite=True)
    assert (tmp_path / "config.json").read_text() == "{}"
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["config.json", weights])


def test_after_an_error_nothing_is_left(one_model, plain_runtime, monkeypatch, tmp_path):
    monkeypatch.setattr(plain_runtime, "write", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(one_model, tmp_path / "out", "plain")
    assert not list(tmp_path.iterdir())


def test_arguments_that_make_no_sense(one_model, plain_runtime, monkeypatch, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="runtime='tensorrt' is unknown; choose one of 'onnx', 'openvino'"):
        export_model(one_model, out, "tensorrt")
    with pytest.raises(ValueError, match="ask for int8 too"):
        export_model(one_model, out, "plain", calibration=[pixels()])
    with pytest.raises(ValueError, match="runtime='torch' has no int8 here; choose 'onnx' or 'openvino'"):
        export_model(one_model, out, "torch", int8=True)
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu; export it from torch.float32"):
        export_model(one_model.to(torch.bfloat16), out, "plain")
    monkeypatch.setattr(plain_runtime, "packages", ("no_such_package",))
    with pytest.raises(ImportError, match="needs no_such_package: pip install torch"):
        export_model(one_model, out, "plain")
    assert not out.exists()


def test_exported_models_are_found_by_their_files(plain_runtime, one_model, tmp_path):
    export_model(one_model, tmp_path / "out", "plain")
    for path in (tmp_path / "out", tmp_path / "out" / "model.plain"):
        assert find_exported(path) == ("plain", tmp_path / "out" / "model.plain")
    one_model.save_pretrained(tmp_path / "checkpoint")
    assert find_exported(tmp_path / "checkpoint") is None
    with pytest.raises(FileNotFoundError, match="holds no exported model"):
        open_exported(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"its name must end in one of \.onnx, \.xml, \.pte, \.pt2, \.plain"):
        find_exported(tmp_path / "checkpoint" / "config.json")
    (tmp_path / "out" / "model.onnx").touch()
    with pytest.raises(ValueError, match=r"several exported models \(model.onnx, model.plain\)"):
        find_exported(tmp_path / "out")


def test_a_file_for_one_batch_size_takes_any_number_of_images(plain_runtime, one_model, tmp_path):
    model = open_exported(export_model(one_model, tmp_path / "out", "plain").file)
    expected = model(pixels(5))["logits"]
    called = []
    run = model.run
    model.run = lambda images: called.append(len(images)) or run(images)
    model.batch_size = 2
    torch.testing.assert_close(model(pixels(5))["logits"], expected)
    assert called == [2, 2, 2]
