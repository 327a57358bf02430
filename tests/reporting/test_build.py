"""The report of a compression that took place."""

import shutil

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
    assert "base_model" not in card.data.to_dict() and "# my-vit," in card.text
    for name in ("README.md", "report.html", "mixrank_report.json", "config.json"):
        assert "elsewhere" not in (tmp_path / "out" / name).read_text(encoding="utf-8"), name


def test_a_model_without_a_name_is_named_by_its_class():
    model = tiny_vit()
    model.name_or_path = ""
    compressor = MixRankCompressor(model)
    compressor.compress(MixRankConfig(recipe="fast", compression_ratio=0.3), [pixels(8)])
    assert compressor.report.model_name == "ViTForImageClassification"
