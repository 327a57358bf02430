"""Random views of images in the form of tensors: more inputs from few images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class Views:
    """How much views differ from their images. The teacher sees the same views, so no view is mislabelled.

    Attributes:
        min_area: Smallest share of the image's area in a crop, in (0, 1], up to rounding to pixels.
        max_aspect: Largest ratio of a crop's sides, relative to that of the image, at least 1.
        jitter: Largest change of the contrast, as a share, and of the brightness of every channel, in normalized values.
        mix: Share of views that are blended with another one (mixup, arXiv 1710.09412).
        cut: Share of views in which a rectangle is replaced by that of another one (CutMix, arXiv 1905.04899).
    """

    min_area: float = 0.5
    max_aspect: float = 4 / 3
    jitter: float = 0.2
    mix: float = 0.2
    cut: float = 0.3


def augment(
    pixel_values: Tensor,
    size: tuple[int, int],
    generator: torch.Generator,
    views: Views = Views(),
    part: slice = slice(None),
) -> Tensor:
    """Mirror, crop, jitter and mix images, each in its own random way.

    Args:
        pixel_values: `[batch, channels, height, width]`, of any floating point dtype. Crops of images larger than `size`
            keep their detail.
        size: Height and width of the views.
        generator: A generator on the CPU.
        views: How much views differ from their images.
        part: Which views to compute; they are the same as if the whole batch were computed.

    Returns:
        `[views, channels, *size]`, float32.
    """
    count, channels, *_ = pixel_values.shape
    # All random numbers are drawn first, and for all images, so that they do not depend on the part.
    mirrored = torch.rand(count, generator=generator) < 0.5
    boxes = _boxes(count, views, generator)
    contrast = 1 + views.jitter * (2 * torch.rand(count, 1, 1, generator=generator) - 1)
    brightness = views.jitter * (2 * torch.rand(count, channels, 1, 1, generator=generator) - 1)
    kinds = torch.rand(count, generator=generator)
    shares = torch.rand(count, generator=generator)
    places = torch.rand(count, 2, generator=generator)

    def view(index: int) -> Tensor:
        image = _crop(pixel_values[index], boxes[index])
        image = interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
        mean = image.mean(dim=(1, 2), keepdim=True)
        image = (image - mean) * contrast[index].to(image) + mean + brightness[index].to(image)
        return image.flip(-1) if mirrored[index] else image

    wanted = range(count)[part]
    needed = {(index - before) % count for index in wanted for before in (0, 1)}
    images = {index: view(index) for index in sorted(needed)}
    mixed = []
    for index in wanted:
        image, other, share = images[index], images[(index - 1) % count], float(shares[index])
        if kinds[index] < views.mix:
            image = image * (1 - share) + other * share
        elif kinds[index] < views.mix + views.cut:
            image = _with_rectangle(image, other, share, places[index])
        mixed.append(image)
    return torch.stack(mixed)


def _boxes(count: int, views: Views, generator: torch.Generator) -> Tensor:
    """Return top, left, height and width of crops as shares of the image's sides, `[count, 4]`."""
    areas = views.min_area + (1 - views.min_area) * torch.rand(count, generator=generator)
    # No side may be longer than that of the image.
    limits = (-areas.log()).clamp_max(math.log(views.max_aspect))
    aspects = (limits * (2 * torch.rand(count, generator=generator) - 1)).exp()
    sides = torch.stack([(areas / aspects).sqrt(), (areas * aspects).sqrt()], dim=1).clamp_max(1)
    places = torch.rand(count, 2, generator=generator) * (1 - sides)
    return torch.cat([places, sides], dim=1)


def _crop(image: Tensor, box: Tensor) -> Tensor:
    full = image.shape[-2:]
    top, left, rows, columns = (max(0, round(float(box[i]) * full[i % 2])) for i in range(4))
    rows, columns = max(1, rows), max(1, columns)
    top, left = min(top, full[0] - rows), min(left, full[1] - columns)
    return image[:, top : top + rows, left : left + columns]


def _with_rectangle(image: Tensor, other: Tensor, share: float, place: Tensor) -> Tensor:
    """Replace a rectangle, which covers a share of the area, by the same rectangle of another image."""
    full = image.shape[-2:]
    rows, columns = (max(1, round(math.sqrt(share) * side)) for side in full)
    top, left = (
        round(float(where) * (side - length)) for where, side, length in zip(place, full, (rows, columns), strict=True)
    )
    image = image.clone()
    image[:, top : top + rows, left : left + columns] = other[:, top : top + rows, left : left + columns]
    return image
