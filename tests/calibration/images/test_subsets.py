"""Images spread over all of them, whole batches or one by one."""

from itertools import pairwise

import pytest
import torch

from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.calibration.images.subsets import spread_batches, spread_images
from optimum_mixrank.runtime.inputs import ModelInputs


def batches_of(*sizes: int) -> list[Batch]:
    """Return batches whose images hold their own numbers."""
    numbers = torch.arange(float(sum(sizes))).view(-1, 1, 1, 1).split(list(sizes))
    return [Batch(pixel_values, index=index) for index, pixel_values in enumerate(numbers)]


def numbers(images: list[ModelInputs]) -> list[int]:
    return torch.cat([each.main for each in images]).flatten().int().tolist() if images else []


class Pair:
    """Two processes of which this is one; `gather` knows what the other has."""

    def __init__(self, other: dict[int, int]) -> None:
        self.other = other

    def gather(self, value):
        return [value, self.other]


def test_images_are_at_equal_distances_over_all_batches():
    assert numbers(spread_images(batches_of(4, 4, 4, 4), 4)) == [2, 6, 10, 14]
    assert numbers(spread_images(batches_of(3, 5, 1), 3)) == [1, 4, 7]


@pytest.mark.parametrize("count", [9, 20])
def test_all_images_where_no_more_are_there(count):
    assert numbers(spread_images(batches_of(3, 5, 1), count)) == list(range(9))


def test_images_are_put_into_new_batches():
    assert [len(each) for each in spread_images(batches_of(4, 4, 4, 4), 6)] == [4, 2]


def test_processes_take_their_share_of_the_same_images():
    first, second, third, fourth = batches_of(4, 4, 4, 4)
    odd = spread_images([second, fourth], 5, Pair({0: 4, 2: 4}))
    even = spread_images([first, third], 5, Pair({1: 4, 3: 4}))
    assert sorted(numbers(even) + numbers(odd)) == numbers(spread_images([first, second, third, fourth], 5))
    assert spread_images([], 5, Pair({0: 4, 1: 4})) == []


def test_whole_batches_hold_at_least_as_many_images():
    sizes = dict.fromkeys(range(10), 8) | {10: 3}
    chosen = spread_batches(sizes, 24)
    assert sum(sizes[number] for number in chosen) >= 24
    gaps = [b - a for a, b in pairwise(chosen)]
    assert max(gaps) - min(gaps) <= 1
    assert spread_batches(sizes, None) == spread_batches(sizes, 83) == list(sizes)
    assert spread_batches({0: 8, 2: 8}, 16, Pair({1: 8, 3: 8})) == spread_batches(dict.fromkeys(range(4), 8), 16)
