"""Random views."""

import pytest
import torch
from compensation.cases import images

from optimum_mixrank.compensation.training.augmentation import Views, augment


UNCHANGED = Views(min_area=1.0, max_aspect=1.0, jitter=0.0, mix=0.0, cut=0.0)
SIZE = (16, 16)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def constant_images(*values):
    return torch.stack([torch.full((1, 8, 8), float(value)) for value in values])


def test_views_are_finite_have_the_given_size_and_repeat_with_the_seed():
    batch = images(16)
    views = [augment(batch, (24, 20), generator(seed)) for seed in (0, 0, 1)]
    assert views[0].shape == (16, 3, 24, 20) and torch.isfinite(views[0]).all()
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_views_without_changes_are_mirrored_or_not():
    batch = images(32)
    size = tuple(batch.shape[-2:])
    views = augment(batch, size, generator(), UNCHANGED)
    mirrored = [torch.allclose(view, image.flip(-1), atol=1e-5) for view, image in zip(views, batch, strict=True)]
    same = [torch.allclose(view, image, atol=1e-5) for view, image in zip(views, batch, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True)) and 8 < sum(mirrored) < 24


@pytest.mark.parametrize("shape", [(32, 32), (48, 20)])
def test_crops_have_the_requested_areas(shape):
    rows, columns = shape
    down, across = torch.linspace(0, 1, rows)[:, None], torch.linspace(0, 1, columns)[None]
    ramp = torch.stack([down.expand(shape), across.expand(shape)]).expand(64, 2, rows, columns)
    changes = Views(min_area=0.4, max_aspect=1.5, jitter=0.0, mix=0.0, cut=0.0)
    views = augment(ramp, (64, 64), generator(), changes)
    extent = (views.amax(dim=(2, 3)) - views.amin(dim=(2, 3))).double()
    area, aspect = extent.prod(dim=1), extent[:, 1] / extent[:, 0]
    # The ramp ends half a pixel before the edges of the image, and sides are whole pixels.
    assert 0.3 < area.min() < 0.55 and 0.85 < area.max() < 1.1
    assert 0.55 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.8


def test_larger_images_give_detail_that_smaller_ones_lack():
    # Stripes two pixels wide disappear in an image of a quarter of the size, but not in a crop of a sixteenth.
    stripes = (torch.arange(64) // 2 % 2).float().expand(8, 1, 64, 64)
    changes = Views(min_area=1 / 16, max_aspect=1.0, jitter=0.0, mix=0.0, cut=0.0)
    whole = augment(stripes, SIZE, generator(), UNCHANGED)
    crops = augment(stripes, SIZE, generator(), changes)
    assert whole[..., 2:-2].std() < 0.1 < crops[..., 2:-2].std()


def test_jitter_changes_contrast_and_brightness_within_its_limits():
    batch = images(64)
    changes = Views(min_area=1.0, max_aspect=1.0, jitter=0.3, mix=0.0, cut=0.0)
    views = augment(batch, tuple(batch.shape[-2:]), generator(), changes)
    contrast = views.std(dim=(2, 3)) / batch.std(dim=(2, 3))
    brightness = views.mean(dim=(2, 3)) - batch.mean(dim=(2, 3))
    assert contrast.min() > 0.69 and contrast.max() < 1.31 and contrast.std() > 0.1
    assert brightness.abs().max() < 0.301 and brightness.std() > 0.1
    # All channels share the contrast; each has its own brightness.
    assert contrast.std(dim=1).max() < 1e-3 and brightness.std(dim=1).max() > 0.05


def test_blended_views_lie_between_two_images():
    batch = constant_images(0, 10, 20, 30)
    views = augment(batch, (8, 8), generator(), Views(jitter=0.0, mix=1.0, cut=0.0))
    for index, view in enumerate(views):
        low, high = sorted((batch[index].mean(), batch[index - 1].mean()))
        assert low - 1e-3 <= view.min() and view.max() <= high + 1e-3
        assert view.std() < 1e-4 and low + 1e-3 < view.mean() < high - 1e-3


def test_rectangles_of_another_image():
    batch = constant_images(0, 10, 20, 30)
    views = augment(batch, SIZE, generator(), Views(jitter=0.0, mix=0.0, cut=1.0))
    for index, view in enumerate(views):
        own, other = batch[index, 0, 0, 0], batch[index - 1, 0, 0, 0]
        is_other = (view[0] - other).abs() < 1e-3
        assert (is_other | ((view[0] - own).abs() < 1e-3)).all() and 0 < is_other.sum() <= 256
        inside = is_other.nonzero()
        height, width = (inside.amax(dim=0) - inside.amin(dim=0) + 1).tolist()
        assert height == width and height * width == is_other.sum()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_views_do_not_depend_on_the_part_that_is_computed(count):
    batch = images(count)
    whole = augment(batch, SIZE, generator())
    for size in (1, 3):
        parts = [slice(start, start + size) for start in range(0, count, size)]
        views = [augment(batch, SIZE, generator(), part=part) for part in parts]
        assert torch.equal(torch.cat(views), whole)


def test_half_precision_gives_the_same_views_up_to_rounding():
    batch = images(6)
    difference = augment(batch, SIZE, generator()) - augment(batch.half(), SIZE, generator())
    assert difference.abs().max() < 0.01
