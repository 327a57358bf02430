"""The card that lies beside a checkpoint."""

import pytest
from huggingface_hub import ModelCard
from models import pixels, tiny_swin, tiny_vit
from reporting.reports import mixed_report, vit_report

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.reporting.card import model_card


CONFIG = {"recipe": "fast", "compression_ratio": 0.3}


def card_of(tmp_path, model, labels=None):
    compressor = MixRankCompressor(model)
    compressed = compressor.compress(MixRankConfig(**CONFIG), [pixels(8)])
    if labels is not None:
        compressor.evaluate(compressed, [(pixels(4), labels)])
    compressor.save_pretrained(compressed, tmp_path / "out")
    return ModelCard.load(tmp_path / "out" / "README.md")


def test_metadata_and_text(tmp_path):
    import torch

    card = card_of(tmp_path, tiny_vit(), torch.tensor([0, 1, 2, 3]))
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert "mixrank" in data["tags"]
    metrics = {entry["name"]: entry["value"] for entry in data["model-index"][0]["results"][0]["metrics"]}
    assert {"top-1 accuracy", "KL from the original (nats)"} <= set(metrics)
    assert "import optimum_mixrank" in card.text and "30% smaller" in card.text
    assert "Parameters of the model" in card.text and "compression_ratio" in card.text


def test_without_evaluation_and_without_head(tmp_path):
    data = card_of(tmp_path, tiny_swin().swin).data.to_dict()
    assert "model-index" not in data and data["pipeline_tag"] == "image-feature-extraction"


@pytest.mark.parametrize("licence", ["apache-2.0", None])
def test_licence_is_carried_over(tmp_path, licence):
    tiny_vit().save_pretrained(tmp_path / "original")
    if licence:
        (tmp_path / "original" / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Original\n")
    compressor = MixRankCompressor.from_pretrained(tmp_path / "original")
    compressor.compress(MixRankConfig(**CONFIG), [pixels(8)], save_directory=tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict().get("license") == licence


@pytest.mark.parametrize("content", ["license: [a\n b: {", "- a list", "model-index: 3", "license: \xff"], ids=str)
def test_a_broken_card_of_the_original_does_not_stop_the_save(tmp_path, content, caplog):
    tiny_vit().save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "README.md").write_bytes(f"---\n{content}\n---\n# Original\n".encode("latin-1"))
    compressor = MixRankCompressor.from_pretrained(tmp_path / "original")
    compressor.compress(MixRankConfig(**CONFIG), [pixels(8)], save_directory=tmp_path / "out")
    assert "license" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert "cannot be read" in caplog.text


def test_says_what_the_encoder_has_become():
    model = tiny_vit()
    plain, narrow = (model_card(model, make()).text for make in (vit_report, mixed_report))
    assert "linear layers of the encoder are pairs of thin factors, chosen so that" in plain
    assert "may share the first of them, and MLPs have fewer hidden units, chosen so that" in narrow
