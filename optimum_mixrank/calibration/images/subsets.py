"""Some of the images, spread over all of them, since neighbours in a dataset often belong to one class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.inputs import ModelInputs, concatenated
from .collating import Batch


def spread_images(batches: Sequence[Batch], count: int, processes: Processes = SINGLE_PROCESS) -> list[ModelInputs]:
    """Return this process's share of `count` images at equal distances among those of all processes, batched anew.

    Args:
        batches: Those of this process.
        count: Number of images; all if there are no more.
        processes: The processes that share the images.

    Returns:
        Inputs of the model.
    """
    sizes = _gather({batch.index: batch.num_images for batch in batches}, processes)
    total = sum(sizes.values())
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[_spread(total, count)] = True
    masks = dict(zip(sizes, chosen.split(list(sizes.values())), strict=True))
    found = [batch.inputs[masks[batch.index]] for batch in batches if masks[batch.index].any()]
    return concatenated(found).split(max(sizes.values())) if found else []


def spread_batches(sizes: Mapping[int, int], count: int | None, processes: Processes = SINGLE_PROCESS) -> list[int]:
    """Return the numbers of whole batches at equal distances that hold about `count` images, among those of all processes.

    Args:
        sizes: Images per batch of this process, by the number of the batch.
        count: Number of images, not less if there are as many; None for all.
        processes: The processes that share the batches.
    """
    gathered = _gather(sizes, processes)
    total = sum(gathered.values())
    if count is None or count >= total:
        return list(gathered)
    numbers = list(gathered)
    return [numbers[position] for position in _spread(len(numbers), math.ceil(count * len(numbers) / total))]


def _gather(sizes: Mapping[int, int], processes: Processes) -> dict[int, int]:
    """Return the images per batch of all processes, in the order of the batches."""
    return dict(sorted((index, size) for each in processes.gather(dict(sizes)) for index, size in each.items()))


def _spread(total: int, count: int) -> list[int]:
    """Return `count` of `total` positions, ascending and at equal distances."""
    count = min(count, total)
    return [(2 * position + 1) * total // (2 * count) for position in range(count)]
