"""The report of a compression that took place."""

import shutil

import pytest
from huggingface_hub import ModelCard
from models import pixels, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig


def test_no_path_is_shown_when_the_original_is_gone(tmp_path):
    original = tmp_path / "elsewhere" / "my-vit"
    tiny_vit().save_pretrained(original)
    compressor = MixRankCompressor.from_pretrained(original)
    shutil.rmtree(original)
    config = MixRankConfig(recipe="fast", compression_ratio=0.3)
    compressor.compress(config, [pixels(8)], save_directory=tmp_path / "out")
    assert compressor.report.model_name == "my-vit"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (
        "base_model" not in card.data.to_dict()
        and "`my-vit` compressed by" in card.text
        and str(tmp_path) not in card.text
    )
    for name in ("README.md", "report.html", "mixrank_report.json", "config.json"):
        assert "elsewhere" not in (tmp_path / "out" / name).read_text(encoding="utf-8"), name


def test_a_model_without_a_name_is_named_by_its_class():
    model = tiny_vit()
    model.name_or_path = ""
    compressor = MixRankCompressor(model)
    compressor.compress(MixRankConfig(recipe="fast", compression_ratio=0.3), [pixels(8)])
    assert compressor.report.model_name == "ViTForImageClassification"


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_figures_of_mixed_structure_add_up(layout):
    model = tiny_vit(num_hidden_layers=3)
    compressor = MixRankCompressor(model)
    settings = {"compression_scope": "targets", "compression_ratio": 0.5, "layout": layout, "compensation": []}
    config = MixRankConfig(**settings, probed_images=0)
    compressed = compressor.compress(config, [pixels(16), pixels(16, 1)])
    report = compressor.report
    assert any(layer.kept_units < 1 for layer in report.layers)
    assert all(0 <= layer.kept_energy <= 1 for layer in report.layers if layer.rank is not None)
    assert report.model_parameters_after == sum(values.numel() for values in compressed.parameters())
    # The chosen budget is one of the profile's.
    [point] = [each for each in report.profile if each["compression_ratio"] == 0.5]
    assert point["model_parameters"] == report.model_parameters_after
    assert point["loss"] == pytest.approx(report.predicted_loss)
    assert point["loss"] == pytest.approx(sum(layer.predicted_loss or 0 for layer in report.layers))
    # A value of a weight is used once for each of 17 tokens.
    removed = sum(layer.parameters_before - layer.parameters_after for layer in report.layers)
    assert report.flops_before - report.flops_after == 2 * 17 * removed
