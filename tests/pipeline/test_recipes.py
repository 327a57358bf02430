"""Recipes that divide the images between closed form and training."""

import logging

import pytest
from models import pixels, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.compensation.training.loop import Trainer


SETTINGS = {"compression_scope": "targets", "compression_ratio": 0.5, "probed_images": 8, "epochs": 1}


def compress(images: int, batch: int = 4, **changes):
    compressor = MixRankCompressor(tiny_vit())
    batches = [pixels(batch, seed) for seed in range(images // batch)]
    model = compressor.compress(MixRankConfig(**{**SETTINGS, **changes}), batches)
    return model, compressor.report


def test_distilled_solves_from_some_images_and_trains_on_all(monkeypatch):
    trained, train = [], Trainer.train

    def recorded(self, num_images, *args):
        trained.append(num_images)
        return train(self, num_images, *args)

    monkeypatch.setattr(Trainer, "train", recorded)
    _, report = compress(40, recipe="distilled", closed_form_images=16)
    assert report.calibration["num_images"] == 16
    assert [step["name"] for step in report.compensation] == ["sequential", "distillation"]
    assert trained == [36]


@pytest.mark.parametrize("limit", [None, 40, 1000])
def test_without_a_limit_all_images_are_used(limit):
    _, report = compress(40, compensation=[], closed_form_images=limit)
    assert report.calibration["num_images"] == 40


def test_a_limit_holds_for_layerwise_steps():
    errors = []
    for limit in (8, 8, None):
        _, report = compress(32, compensation=["sequential"], closed_form_images=limit, held_out_ratio=0.25)
        errors.append(report.compensation[0]["details"]["layer_errors"])
    assert errors[0] == errors[1] != errors[2]


def test_distilled_says_when_there_are_few_images(caplog, monkeypatch):
    # The library's logger does not propagate by default.
    monkeypatch.setattr(logging.getLogger("optimum_mixrank"), "propagate", True)
    compress(16, recipe="distilled")
    assert "recipe='distilled' trains on 16 images, which is few" in caplog.text
