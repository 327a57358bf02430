"""Held-out images, and the rule that a step is kept only if it lowers the error on them."""

import copy

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images

from optimum_mixrank import FactoredLinear, MixRankCompressor
from optimum_mixrank.compensation import CompensationTask, Compensator
from optimum_mixrank.compensation.held_out import accept_if_improved, model_outputs, split_batches
from optimum_mixrank.runtime.inputs import concatenated


class Spoiler(Compensator):
    name = "spoiler"

    def compensate(self, task):
        for module in task.model.modules():
            if isinstance(module, FactoredLinear):
                module.factor_a.weight.data.mul_(3)
        return {"spoiled": True}


def test_a_step_that_does_not_help_is_undone():
    original = FAMILIES["vit"]()
    compressed, _ = compress(original, config(compensation=[]))
    before = copy.deepcopy(compressed.state_dict())
    held_out = [images(8, seed=3)]
    references = model_outputs(original, held_out)
    task = CompensationTask(original, compressed, [], {}, {}, [images(8)], held_out, references, config())
    result = accept_if_improved(Spoiler(), task)
    assert not result.kept and result.error_after > result.error_before and result.details == {"spoiled": True}
    assert all(torch.equal(before[name], tensor) for name, tensor in compressed.state_dict().items())


def test_split_holds_out_random_images_and_loses_none():
    numbered_images = torch.arange(100.0).view(100, 1, 1, 1)
    batches = dict(enumerate(numbered_images.split(7)))
    learn, held_out = split_batches(batches, 0.2, seed=0)
    learned, held = torch.cat(list(learn.values())).flatten(), concatenated(held_out).main.flatten()
    assert len(held) == 20 and sorted([*learned.tolist(), *held.tolist()]) == list(range(100))
    # Images sorted by class must not end up on one side.
    assert held.min() < 20 and held.max() > 80
    assert all(set(part.flatten().tolist()) <= set(batches[index].flatten().tolist()) for index, part in learn.items())
    assert [len(batch) for batch in held_out] == [7, 7, 6]
    # The split does not depend on the batches.
    assert torch.equal(concatenated(split_batches({0: numbered_images}, 0.2, seed=0)[1]).main.flatten(), held)
    assert [len(part[0]) for part in split_batches({0: images(2)}, 0.9, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="needs at least 2; there are 1"):
        split_batches({0: images(1)}, 0.1, seed=0)


def test_a_single_image_is_too_few():
    with pytest.raises(ValueError, match="needs at least 2; there are 1. Give more calibration images"):
        MixRankCompressor(FAMILIES["vit"]()).compress(config(), [images(1)])
