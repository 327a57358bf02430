"""Views from images at a higher resolution than the model sees."""

import logging

import pytest
import torch
from calibration.pictures import processor, write
from compensation.cases import FAMILIES, config, images
from models import IMAGE_SIZE
from torch.nn.functional import interpolate

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.images.batches import ImageBatches
from optimum_mixrank.compensation.run import prepare_images
from optimum_mixrank.compensation.training import distillation
from optimum_mixrank.runtime.inputs import concatenated


DISTILLATION = {"compensation": ["distillation"], "metric": "second_moment", "epochs": 1, "train_batch_size": 4}


def test_decoded_images_are_those_to_learn_from_in_the_same_order(tmp_path):
    batches = ImageBatches(
        [str(path) for path in sorted(write(tmp_path / "images", 11, broken=[4]).iterdir())],
        image_processor=processor(),
        batch_size=4,
        max_broken_share=0.5,
    )
    settings = config(**DISTILLATION, held_out_ratio=0.3)
    prepared = prepare_images(FAMILIES["vit"](), list(batches), settings, source=batches)
    learned, high_resolution = prepared.batches, prepared.high_resolution.decode()
    assert list(high_resolution) == list(learned) and sum(map(len, learned.values())) == 7
    large, small = torch.cat(list(high_resolution.values())), concatenated(list(learned.values())).main
    assert large.shape[2:] == (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    again = interpolate(large.float(), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    distance = (again[:, None] - small[None]).square().mean(dim=(2, 3, 4))
    assert distance.argmin(dim=1).tolist() == list(range(7))


@pytest.mark.parametrize("broken", ["03.png", "08.png"])
def test_images_that_have_changed_are_noticed(tmp_path, broken):
    paths = sorted(write(tmp_path / "images", 9).iterdir())
    batches = ImageBatches(
        [str(path) for path in paths], image_processor=processor(), batch_size=4, max_broken_share=0.5
    )
    prepared = prepare_images(FAMILIES["vit"](), list(batches), config(**DISTILLATION), source=batches)
    (tmp_path / "images" / broken).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"Batch [02] of the calibration images holds other images than when"):
        prepared.high_resolution.decode()


def test_only_steps_that_draw_views_need_a_higher_resolution(tmp_path):
    folder = write(tmp_path / "images", 8)
    batches = ImageBatches([str(path) for path in folder.iterdir()], image_processor=processor(), batch_size=4)
    for changes in ({"compensation": ["sequential"]}, {"view_scale": 1}):
        settings = config(**{**DISTILLATION, **changes})
        assert prepare_images(FAMILIES["vit"](), list(batches), settings, source=batches).high_resolution is None


def test_views_come_from_images_at_the_higher_resolution(tmp_path, monkeypatch):
    shapes = set()
    augment = distillation.augment

    def spy(pixel_values, size, *args):
        shapes.add((tuple(pixel_values.shape[2:]), size))
        return augment(pixel_values, size, *args)

    monkeypatch.setattr(distillation, "augment", spy)
    model = FAMILIES["vit"]()
    folder = write(tmp_path / "images", 8)
    small, large = (IMAGE_SIZE, IMAGE_SIZE), (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    for scale, size in ((1, small), (2, large)):
        MixRankCompressor(model, processor()).compress(config(**DISTILLATION, view_scale=scale), folder)
        assert shapes == {(size, small)}
        shapes.clear()


def test_tensors_are_used_as_they_are_with_a_message(caplog):
    with caplog.at_level(logging.INFO, logger="optimum_mixrank"):
        MixRankCompressor(FAMILIES["vit"]()).compress(config(**DISTILLATION), list(images(16).split(8)))
    assert "Views are taken from the images as the model sees them" in caplog.text
