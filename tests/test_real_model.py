"""The main job on a pretrained checkpoint and photographs; see CONTRIBUTING.md for the two variables."""

import os

import pytest
import torch
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig


pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def images():
    return os.environ["MIXRANK_TEST_IMAGES"]


@pytest.fixture(scope="module")
def compressor():
    return MixRankCompressor.from_pretrained(os.environ["MIXRANK_TEST_MODEL"])


@pytest.fixture(scope="module")
def calibration(compressor, images):
    dataset = compressor.get_calibration_dataset(images, split="train", num_samples=128)
    return compressor.calibrate(dataset, ["second_moment"])


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_compressed_checkpoint_agrees_with_the_model_in_memory(compressor, calibration, images, ratio, tmp_path):
    config = MixRankConfig(recipe="fast", compression_ratio=ratio)
    model = compressor.compress(config, calibration=calibration, save_directory=tmp_path / "out")
    parameters = sum(parameter.numel() for parameter in compressor.model.parameters())
    left = sum(parameter.numel() for parameter in model.parameters())
    assert (1 - ratio) * parameters * 0.999 < left <= (1 - ratio) * parameters
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    pixel_values = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(reloaded(pixel_values).logits, model(pixel_values).logits)
    result = compressor.evaluate(reloaded, images, split="validation", num_samples=200)
    assert result.num_images == 200
    assert result.kl > 0


def test_second_moment_loses_less_than_plain_svd(compressor, calibration, images):
    results = {}
    for metric in ("svd", "second_moment"):
        model = compressor.compress(
            MixRankConfig(recipe="fast", compression_ratio=0.3, metric=metric), calibration=calibration
        )
        results[metric] = compressor.evaluate(model, images, split="validation", num_samples=200)
    assert results["second_moment"].kl < results["svd"].kl
