"""`optimum-cli mixrank export` and `verify`."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from commands.calling import cli
from models import IMAGE_SIZE, mixed, segformer, tiny_vit
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from optimum_mixrank import FactoredLinear, deployment
from optimum_mixrank.commands.images import read_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "checkpoint"
    mixed(tiny_vit(), "pivoted").save_pretrained(folder)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint):
    folder = checkpoint.parent / "exported"
    values = json.loads(cli("export", "--model", checkpoint, "--output", folder, "--runtime", "torch", "--json")[0])
    assert values["file"] == str(folder / "model.pt2") and values["quantized"] is None
    assert values["bytes"] == (folder / "model.pt2").stat().st_size
    assert {each.name for each in folder.iterdir()} == {"model.pt2", "config.json", "preprocessor_config.json"}
    return folder


def test_an_exported_model_is_verified(checkpoint, exported):
    stdout, _ = cli("verify", "--model", checkpoint, "--exported", exported)
    assert stdout.splitlines()[-1] == "ok" and "max difference" in stdout
    values = json.loads(cli("verify", "--model", checkpoint, "--exported", exported / "model.pt2", "--json")[0])
    assert values["ok"] and values["num_images"] == 32 and values["max_difference"] < 1e-4


def test_plain_factors_have_nothing_to_reorder(checkpoint, exported, tmp_path):
    out = tmp_path / "plain"
    cli("export", "--model", checkpoint, "--output", out, "--runtime", "torch", "--plain-factors")
    assert cli("verify", "--model", checkpoint, "--exported", out)[0].splitlines()[-1] == "ok"
    reorders = ["gather" in str(torch.export.load(each / "model.pt2").graph) for each in (exported, out)]
    assert reorders == [True, False]


def test_a_broken_model_ends_with_an_error_code(checkpoint, exported, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        model.classifier.bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    stdout, _ = cli("verify", "--model", tmp_path / "other", "--exported", exported, code=1)
    assert stdout.splitlines()[-1] == "broken: the outputs differ by 1, the limit is 0.0001"
    values = json.loads(cli("verify", "--model", tmp_path / "other", "--exported", checkpoint, "--json", code=1)[0])
    assert not values["ok"] and values["problems"]
    options = ("--max-difference", 1.001)
    assert cli("verify", "--model", tmp_path / "other", "--exported", exported, *options)[0].endswith("ok\n")


def test_a_checkpoint_in_half_precision_names_what_overflows(checkpoint, tmp_path):
    assert "first overflow        none" in cli("verify", "--model", checkpoint, "--dtype", "float16")[0]
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    name, layer = next((name, each) for name, each in model.named_modules() if isinstance(each, FactoredLinear))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1e5)
    model.save_pretrained(tmp_path / "large")
    stdout, _ = cli("verify", "--model", tmp_path / "large", "--dtype", "float16", code=1)
    assert f"first overflow        in `{name}" in stdout and "outputs are NaN or Inf" in stdout


def test_options_that_make_no_sense(checkpoint, exported):
    again = ("export", "--model", checkpoint, "--output", exported, "--runtime", "torch")
    assert "is not empty; choose another" in cli(*again, code=1)[1]
    assert "name images for" not in cli(*again, "--overwrite")[1]
    assert "add --int8, or leave it out" in cli(*again, "--dataset", "images", code=1)[1]
    verify = ("verify", "--model", checkpoint)
    assert "Name what to compare the checkpoint with: --exported, or --dtype" in cli(*verify, code=1)[1]
    assert "--dtype float32 is not half precision" in cli(*verify, "--dtype", "float32", code=1)[1]
    both = cli(*verify, "--exported", exported, "--dtype", "float16", code=1)[1]
    assert "--exported and --dtype name two things" in both
    limits = {
        ("--min-agreement", 95): "--min-agreement 95 is not in [0, 1]: did you mean 0.95?",
        ("--min-agreement", -1): "--min-agreement -1 is not in [0, 1], a share of the images.",
        ("--max-kl", -1): "--max-kl -1 is not a number of at least 0.",
        ("--max-difference", "nan"): "--max-difference nan is not a number of at least 0.",
    }
    for limit, message in limits.items():
        assert message in cli(*verify, "--dtype", "float16", *limit, code=1)[1]


def test_other_preprocessing_is_a_problem(checkpoint, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    other = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "image_mean": [0, 0, 0]}
    ViTImageProcessor(**other).save_pretrained(tmp_path / "out")
    stdout, _ = cli("verify", "--model", checkpoint, "--exported", tmp_path / "out", code=1)
    assert "broken: preprocessor_config.json beside the exported model has image_mean=[0, 0, 0]" in stdout


def test_a_damaged_image_processor_is_noticed_before_the_comparison(checkpoint, exported, tmp_path, monkeypatch):
    other = shutil.copytree(exported, tmp_path / "other")
    (other / "preprocessor_config.json").write_text("{")
    monkeypatch.setattr(deployment.verify, "verify_model", lambda *_, **__: pytest.fail("compared"))
    _, error = cli("verify", "--model", checkpoint, "--exported", other, code=1)
    assert "preprocessor_config.json" in error and "not a valid JSON file" in error


def test_sizes_of_images_are_named(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    segformer().save_pretrained(model)
    export = ("export", "--model", model, "--output", out, "--runtime", "torch")
    assert "pass --image-size" in cli(*export, code=1)[1]
    cli(*export, "--image-size", 32, 64)
    verify = ("verify", "--model", model, "--exported", out)
    assert cli(*verify, "--image-size", 32, 64)[0].endswith("ok\n")
    assert "does not run on images of 3 x 64 x 64" in cli(*verify, "--image-size", 64, code=1)[1]
    assert "--image-size has no effect with --dataset" in cli(*verify, "--dataset", "x", "--image-size", 64, code=1)[1]
    assert "--image-size 0 is not a height and a width" in cli(*verify, "--image-size", 0, code=1)[1]


def test_the_runtime_is_checked_before_the_checkpoint_is_read(tmp_path):
    export = ("export", "--model", tmp_path / "nothing", "--output", tmp_path / "out", "--runtime")
    assert "--runtime tensorrt is unknown" in cli(*export, "tensorrt", code=1)[1]
    assert "--runtime torch has no int8" in cli(*export, "torch", "--int8", code=1)[1]


def test_images_for_ranges_need_no_labels(checkpoint, tmp_path):
    for name in ("zebra", "okapi"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (90, 10, 200)).save(tmp_path / name / "1.png")
    names = {"dataset": str(tmp_path), "split": None, "image_column": None}
    args = SimpleNamespace(num_samples=2, seed=1, batch_size=2, **names)
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    processor = ViTImageProcessor.from_pretrained(checkpoint)
    (batch,) = read_images(args, model, processor, ("train",), labelled=False)
    assert batch.pixel_values.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
