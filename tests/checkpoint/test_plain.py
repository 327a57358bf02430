"""Models with fewer units become ordinary models of a smaller configuration where there is one."""

import json

import pytest
import torch
from checkpoint.mixed import UNITS, mixed_model
from models import pixels, tiny_deit, tiny_swin, tiny_vit
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.checkpoint.entries import compressed_layers
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.checkpoint.narrowing import widened
from optimum_mixrank.checkpoint.plain import make_plain


@pytest.mark.parametrize("family", [tiny_vit, tiny_deit], ids=["vit", "deit"])
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_equal_widths_are_a_smaller_configuration(family, layout, tmp_path):
    model, _ = mixed_model(layout, model=family())
    with torch.no_grad():
        expected = model(pixels()).logits
    dense = to_dense(model, keep_widths=True)
    assert dense.config.intermediate_size == UNITS
    assert not compressed_layers(dense)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(pixels()).logits, dense(pixels()).logits)
        torch.testing.assert_close(dense(pixels()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["one block is wide", "swin"])
def test_other_widths_stay_a_compressed_checkpoint_of_dense_layers(kind, tmp_path):
    # The MLPs of Swin's first stage have 32 units and stay as they are; those of the second have 64 and keep 40.
    model, _ = mixed_model(model=tiny_swin() if kind == "swin" else None, shared=kind != "swin")
    if kind != "swin":
        for name, layer in list(compressed_layers(model).items()):
            if ".1." in name and getattr(layer, "narrow_from", None):
                dense = layer if isinstance(layer, torch.nn.Linear) else layer.to_linear()
                replace_module(model, name, widened(dense, *layer.narrow_from))
    with torch.no_grad():
        expected = model(pixels()).logits
    config = model.config.to_dict()
    config.pop("quantization_config")
    dense = to_dense(model, keep_widths=True)
    found = dense.config.to_dict()
    found.pop("quantization_config")
    assert found == config
    dense.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {entry["layout"] for entry in stored["rank_map"].values()} == {"dense"}
    assert stored["layout_version"] == 2
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(pixels()).logits, dense(pixels()).logits)
        torch.testing.assert_close(dense(pixels()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("self_contained", [None, True])
def test_equal_widths_are_saved_as_a_smaller_configuration(self_contained, tmp_path):
    model, _ = mixed_model(factored=False, shared=False)
    layers = compressed_layers(model).keys()
    before = model.config.to_dict()
    model.save_pretrained(tmp_path, self_contained=self_contained)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["intermediate_size"] == UNITS and not {"quantization_config", "auto_map"} & stored.keys()
    assert [each.name for each in tmp_path.glob("*.py")] == []
    # In memory it stays a compressed model of the original's configuration.
    assert compressed_layers(model).keys() == layers and model.config.to_dict() == before
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not compressed_layers(reloaded)
    with torch.no_grad():
        assert torch.equal(reloaded(pixels()).logits, model(pixels()).logits)


def uniform_widths(ratio):
    return MixRankConfig(
        compression_ratio=ratio,
        compression_scope="targets",
        structures=["width"],
        allocation="uniform",
        compensation=[],
        probed_images=0,
    )


@pytest.mark.parametrize(("family", "ratio"), [(tiny_vit, 0.4), (tiny_deit, 0.3), (tiny_swin, 0.3)])
def test_uniform_widths_give_an_ordinary_checkpoint(family, ratio, tmp_path):
    config = uniform_widths(ratio)
    compressor = MixRankCompressor(family())
    model = compressor.compress(config, [pixels(16)], tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in stored
    assert ratio <= compressor.report.removed_of_targets < ratio + 0.05
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(reloaded(pixels()).logits, model(pixels()).logits)
    assert to_dense(model).config.to_dict() == family().config.to_dict()


def dinov2():
    """A tiny model whose `mlp_ratio` Transformers 5 accepts as a whole number only."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, mlp_ratio=4, num_labels=5)).eval()


@pytest.mark.parametrize(("ratio", "units"), [(0.15, 144), (0.25, 120)], ids=["three quarters", "five eighths"])
def test_a_ratio_that_has_to_be_a_whole_number(ratio, units, tmp_path):
    config = uniform_widths(ratio)
    compressor = MixRankCompressor(dinov2())
    model = compressor.compress(config, [pixels(16)], tmp_path)
    widths = {layer.shape_after[1] for layer in compressor.report.layers if layer.shape_after != layer.shape}
    assert units in widths
    stored = json.loads((tmp_path / "config.json").read_text())
    # What 4.57 writes is also read by 5.
    assert repr(stored["mlp_ratio"]) == ("3" if units == 144 else "4")
    assert ("quantization_config" in stored) == (units == 120)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(pixels()).logits, model(pixels()).logits)
    # The compressed model in memory becomes the same.
    assert to_dense(model, keep_widths=True).config.mlp_ratio == reloaded.config.mlp_ratio


def test_without_fewer_units_they_are_dense():
    model, _ = mixed_model()
    for name, layer in list(compressed_layers(model).items()):
        if getattr(layer, "narrow_from", None):
            replace_module(model, name, torch.nn.Linear(*layer.narrow_from[0][::-1]))
    dense = to_dense(model, keep_widths=True)
    assert not compressed_layers(dense)
    assert not hasattr(dense.config, "quantization_config")
    assert not make_plain(dense)


def test_factored_layers_are_no_smaller_configuration():
    model, _ = mixed_model()
    assert not make_plain(model)
    assert model.config.intermediate_size == 64
    assert compressed_layers(model)
