"""What is exported of models that take more than images."""

import pytest
import torch
from families.catalogue import FAMILIES
from models import tiny_vit

from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.deployment.export import export_model
from optimum_mixrank.deployment.image_part import image_part
from optimum_mixrank.deployment.opening import open_exported
from optimum_mixrank.deployment.verify import random_pixels, verify_model


def test_of_two_towers_that_for_images(tmp_path):
    model = FAMILIES["CLIP"].make()
    images = random_pixels(model, 3)
    export_model(model, tmp_path / "out", "torch")
    exported = open_exported(tmp_path / "out")
    (found,) = exported(images).values()
    with torch.no_grad():
        expected = model.get_image_features(images)
    # Transformers 5 returns more than the embeddings.
    assert torch.allclose(found, getattr(expected, "pooler_output", expected), atol=1e-5)
    assert verify_model(model, exported, [Batch(images)]).is_ok


def test_a_model_that_takes_images_alone_is_itself():
    model = tiny_vit()
    assert image_part(model) is model


@pytest.mark.parametrize(("name", "part"), [("LLaVA", "vision_tower"), ("TrOCR", "encoder")])
def test_the_part_to_export_instead_is_named(name, part):
    with pytest.raises(ValueError, match=rf"takes images alone\. Export its vision part .*`model\.(model\.)?{part}`"):
        image_part(FAMILIES[name].make())


def test_a_size_on_which_a_model_does_not_run_is_named():
    with pytest.raises(
        ValueError, match="does not run on images of 48 x 64 pixels, only on those of 32 x 32, which its"
    ):
        image_part(tiny_vit(), (3, 48, 64))
