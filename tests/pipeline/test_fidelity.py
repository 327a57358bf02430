"""The comparison with the original that every compression ends with."""

import pytest
import torch
from models import pixels, tiny_swin, tiny_vit
from transformers import ViTModel

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.runtime.fidelity import agreement, kl_divergence


def compress(model, images, **changes):
    compressor = MixRankCompressor(model)
    settings = {"compression_scope": "targets", "compression_ratio": 0.5, "probed_images": 0, **changes}
    return compressor.compress(MixRankConfig(**settings), images), compressor.report


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_it_is_that_of_the_models(recipe):
    model, images = tiny_vit(), [pixels(16), pixels(16, 1)]
    compressed, report = compress(model, images, recipe=recipe, held_out_ratio=0.25)
    found = report.fidelity
    assert found["num_images"] == (32 if recipe == "fast" else 8) and found["held_out"] == (recipe == "best")
    with torch.no_grad():
        logits = [[each(pixel_values=batch).logits for batch in images] for each in (model, compressed)]
    original, result = map(torch.cat, logits)
    if recipe == "fast":
        assert found["agreement"] == pytest.approx(float(agreement(original, result).double().mean()))
        assert found["kl"] == pytest.approx(float(kl_divergence(original, result).mean()), rel=1e-4)
    else:
        assert found["kl"] == pytest.approx(report.compensation[-1][f"error_{_state(report)}"], rel=1e-4)


def _state(report):
    return "after" if report.compensation[-1]["kept"] else "before"


def test_a_model_without_classes_is_judged_by_its_features():
    encoder = ViTModel(tiny_vit().config).eval()
    _, report = compress(encoder, [pixels(16)], recipe="fast")
    assert report.fidelity["kind"] == "features" and report.fidelity["feature_error"] > 0
    assert 0 < report.fidelity["correlation"] < 1


@pytest.mark.parametrize("images", [None, iter([pixels(8)])], ids=["none", "iterator"])
def test_there_is_none_without_images_that_can_be_read_again(images):
    _, report = compress(tiny_swin(), images, recipe="fast", metric="svd" if images is None else "second_moment")
    assert report.fidelity == {}
