"""The card that lies beside a checkpoint."""

import pytest
import torch
from huggingface_hub import ModelCard
from models import pixels, tiny_swin, tiny_vit
from reporting.reports import mixed_report, vit_report
from transformers import ViTForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.reporting import CompressionReport
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
    card = card_of(tmp_path, tiny_vit(), torch.tensor([0, 1, 2, 3]))
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert "mixrank" in data["tags"]
    metrics = {entry["name"]: entry["value"] for entry in data["model-index"][0]["results"][0]["metrics"]}
    assert {"top-1 accuracy", "KL from the original (nats)"} <= set(metrics)
    assert "import optimum_mixrank" in card.text and "30\u00a0% smaller" in card.text
    # The model's own name, and before all else the table of what has changed.
    assert card.text.strip().startswith("# out\n") and 'from_pretrained("out")' in card.text
    assert card.text.index("| parameters | ") < card.text.index("| top-1 accuracy | ") < card.text.index("## Use")
    assert "Parameters of the model" in card.text and "compression_ratio" in card.text


@pytest.mark.parametrize("reopened", [False, True])
def test_an_evaluation_after_saving_is_added(tmp_path, reopened):
    tiny_vit().save_pretrained(tmp_path / "original")
    compressor = MixRankCompressor.from_pretrained(tmp_path / "original")
    compressor.compress(MixRankConfig(**CONFIG), [pixels(8)], save_directory=tmp_path / "out")
    file = tmp_path / "out" / "README.md"
    assert "top-1" not in file.read_text() and "measured while compressing" in file.read_text()
    file.write_text(file.read_text().replace("## Use", "## A paragraph of the user's\n\n## Use"))
    if reopened:
        compressor = MixRankCompressor.from_pretrained(tmp_path / "original")
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    result = compressor.evaluate(model, [(pixels(4), torch.tensor([0, 1, 2, 3]))])
    card, report = ModelCard.load(file), CompressionReport.load(tmp_path / "out")
    assert f"| {100 * result.top1:.2f}\u00a0% |" in card.text and "measured while compressing" not in card.text
    assert "## A paragraph of the user's" in card.text and "model-index" in card.data.to_dict()
    assert report.evaluation["top1"] == result.top1
    assert f"{100 * result.top1:.2f}" in (tmp_path / "out" / "report.html").read_text()


def test_an_evaluation_against_another_model_is_not_added(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "original")
    compressor = MixRankCompressor.from_pretrained(tmp_path / "original")
    compressor.compress(MixRankConfig(**CONFIG), [pixels(8)], save_directory=tmp_path / "out")
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    MixRankCompressor(tiny_vit()).evaluate(model, [pixels(4)])
    assert CompressionReport.load(tmp_path / "out").evaluation is None


def test_paths_of_the_machine_are_not_shown(tmp_path):
    report = vit_report(settings={"dataset": str(tmp_path / "images"), "latency_table": "/somewhere/table.json"})
    text = model_card(tiny_vit(), report).text
    assert str(tmp_path) not in text and "/somewhere" not in text and "| dataset | `images` |" in text


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
