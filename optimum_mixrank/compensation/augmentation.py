"""Random views of images that are tensors already: more inputs for the same teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def augment(
    pixel_values: Tensor,
    generator: torch.Generator,
    min_scale: float = 0.6,
    mix: float = 0.5,
    part: slice = slice(None),
) -> Tensor:
    """Flip, crop and mix images, each image on its own draw.

    Half of the images are mirrored; each is replaced by a random square crop, stretched to its size, with a share of
    `min_scale` to 1 of its area; a share `mix` of them is then blended with the next image of the batch, by a weight
    drawn between 0 and 1.

    Args:
        pixel_values: `[batch, channels, height, width]`.
        generator: On the CPU.
        min_scale: Smallest share of the area.
        mix: Share of blended images.
        part: Which views are wanted; they are those that the whole batch would have there.
    """
    count, _, height, width = pixel_values.shape
    flips = torch.rand(count, generator=generator) < 0.5
    scales = (min_scale + (1 - min_scale) * torch.rand(count, generator=generator)).sqrt()
    places = torch.rand(count, 2, generator=generator)
    mixed = torch.rand(count, generator=generator) < mix
    shares = torch.where(mixed, torch.rand(count, generator=generator), torch.zeros(count))
    wanted = range(count)[part]
    views = {}
    for index in {(index - before) % count for index in wanted for before in (0, 1)}:
        scale, place = float(scales[index]), places[index]
        rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
        top, left = round(float(place[0]) * (height - rows)), round(float(place[1]) * (width - columns))
        crop = pixel_values[index, None, :, top : top + rows, left : left + columns]
        view = interpolate(crop, (height, width), mode="bilinear", antialias=True)
        views[index] = view.flip(-1) if flips[index] else view
    images = torch.cat([views[index] for index in wanted])
    others = torch.cat([views[(index - 1) % count] for index in wanted])
    share = shares[part].to(images)[:, None, None, None]
    return images * (1 - share) + others * share
