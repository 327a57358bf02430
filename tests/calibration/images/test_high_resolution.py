"""The same images, larger."""

from types import SimpleNamespace

import pytest
import torch
from calibration.pictures import processor, write
from models import IMAGE_SIZE
from torch.nn.functional import interpolate
from transformers import ConvNextImageProcessor, DeiTImageProcessor, ViTImageProcessor

from optimum_mixrank import load_image_dataset
from optimum_mixrank.calibration.images.batches import ImageBatches
from optimum_mixrank.calibration.images.high_resolution import enlarged_processor


def batches_of(source, **arguments):
    return ImageBatches(source, image_processor=processor(), batch_size=3, **arguments)


@pytest.mark.parametrize(
    "original",
    [
        ViTImageProcessor(size={"height": 20, "width": 16}),
        DeiTImageProcessor(size={"height": 24, "width": 24}, crop_size={"height": 20, "width": 16}),
        DeiTImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 16}),
        DeiTImageProcessor(size={"height": 20, "width": 16}, do_center_crop=False),
    ],
)
@pytest.mark.parametrize("scale", [1.5, 2])
def test_sizes_are_multiplied_and_the_view_stays(tmp_path, original, scale):
    from PIL import Image

    gradient = Image.linear_gradient("L").convert("RGB").resize((300, 240))
    before = original.to_dict()
    enlarged = enlarged_processor(original, scale)
    small, large = (each(images=[gradient], return_tensors="pt")["pixel_values"] for each in (original, enlarged))
    assert small.shape[2:] == (20, 16) and large.shape[2:] == (20 * scale, 16 * scale)
    torch.testing.assert_close(interpolate(large, (20, 16), mode="area"), small, atol=0.15, rtol=0)
    assert original.to_dict() == before


def test_processors_without_sizes_that_could_be_multiplied():
    assert enlarged_processor(SimpleNamespace(do_rescale=True), 2) is None
    assert enlarged_processor(SimpleNamespace(size={"max_pixels": 1000}), 2) is None
    assert enlarged_processor(SimpleNamespace(size=(32, 32)), 2) is None
    assert enlarged_processor(ViTImageProcessor(do_resize=False), 2) is None
    assert enlarged_processor(DeiTImageProcessor(do_resize=False), 2) is None
    assert enlarged_processor(ConvNextImageProcessor(), 2) is None
    assert enlarged_processor(SimpleNamespace(size=32), 1.5).size == 48


def test_batches_hold_the_same_images_and_broken_ones_are_named_once(tmp_path, caplog):
    # 40 x 36 pixels each, which the model sees smaller.
    folder = write(tmp_path / "images", 8, broken=[1, 5])
    batches = batches_of(load_image_dataset(folder, split="train"), max_broken_share=0.5)
    small = list(batches)
    enlarged = batches.enlarged(2)
    large = list(enlarged)
    assert [batch.index for batch in large] == [batch.index for batch in small]
    assert enlarged.broken == batches.broken and len(batches.broken) == 2
    for before, after in zip(small, large, strict=True):
        assert after.pixel_values.shape[2:] == (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
        assert after.pixel_values.dtype == torch.float16 and before.pixel_values.dtype == torch.float32
        again = interpolate(after.pixel_values.float(), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        distance = (again[:, None] - before.pixel_values[None]).square().mean(dim=(2, 3, 4))
        # Nearest to the image that it is of.
        assert distance.argmin(dim=1).tolist() == list(range(len(distance)))


def test_tensors_and_iterators_give_no_larger_images():
    pixel_values = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batches_of([pixel_values]).enlarged(2) is None
    assert batches_of(iter([pixel_values])).enlarged(2) is None
