"""Held-out images, and the rule that a step is undone if it does harm on them."""

import copy
from dataclasses import replace

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images

from optimum_mixrank import FactoredLinear, MixRankCompressor
from optimum_mixrank.compensation import CompensationTask, Compensator
from optimum_mixrank.compensation.held_out import (
    compensate_or_restore,
    held_out_errors,
    is_accepted,
    is_significantly_larger,
    model_outputs,
    output_errors,
    split_batches,
)
from optimum_mixrank.runtime.inputs import ModelInputs, concatenated


class Spoiler(Compensator):
    name = "spoiler"
    closed_form = True

    def compensate(self, task):
        for module in task.model.modules():
            if isinstance(module, FactoredLinear):
                module.factor_a.weight.data.mul_(3)
        return {"spoiled": True}


@pytest.fixture
def task():
    original = FAMILIES["vit"]()
    compressed, _ = compress(original, config(compensation=[]))
    held_out = [images(8, seed=3)]
    references = model_outputs(original, held_out)
    return CompensationTask(original, compressed, [], {}, {}, [images(8)], held_out, references, config())


def test_a_step_that_does_harm_is_undone(task):
    before = copy.deepcopy(task.model.state_dict())
    result = compensate_or_restore(Spoiler(), task)
    assert not result.kept and result.error_after > result.error_before and result.details == {"spoiled": True}
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())


def test_errors_are_those_of_images_where_every_frame_has_a_row(task, monkeypatch):
    """Frames of a video are not independent samples."""

    def frames(output):
        return replace(output, logits=None, features=(output.logits,))

    outputs = [frames(output) for output in model_outputs(task.model, task.held_out)]
    references = [frames(output) for output in task.references]
    monkeypatch.setattr("optimum_mixrank.compensation.held_out.model_outputs", lambda *_: outputs)
    videos = replace(task, held_out=[ModelInputs(torch.zeros(4, 2, 3, 32, 32))], references=references)
    expected = output_errors(outputs, references).unflatten(0, (4, 2)).mean(dim=1)
    assert torch.allclose(held_out_errors(videos), expected)


@pytest.mark.parametrize("closed_form", [True, False])
def test_only_a_closed_form_is_kept_whose_loss_chance_explains(task, monkeypatch, closed_form):
    monkeypatch.setattr(Spoiler, "closed_form", closed_form)
    before = held_out_errors(task)
    # One image of eight gets worse, all others a little better.
    after = 0.9 * before + torch.tensor([float(before.sum()) / 2, *[0.0] * 7])
    found = iter([before, after])
    monkeypatch.setattr("optimum_mixrank.compensation.held_out.held_out_errors", lambda task: next(found))
    result = compensate_or_restore(Spoiler(), task)
    assert result.kept == closed_form and result.error_after > result.error_before
    assert (result.error_before, result.error_after) == (float(before.mean()), float(after.mean()))


def test_significance_is_that_of_a_paired_test():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(400, generator=generator, dtype=torch.float64) ** 8
    change = 0.02 * torch.randn(400, generator=generator, dtype=torch.float64)
    z = float(change.mean() / (change.std() / 400**0.5))
    for shift in (-2, 1.6 - z, 1.7 - z, 3):
        after = before + change + shift * change.std() / 400**0.5
        assert is_significantly_larger(after, before) == (z + shift > 1.645), shift
    # Unpaired, the spread of the images would hide a loss that every image shows.
    assert is_significantly_larger(before + 1e-4, before)


def test_equal_errors_do_no_harm_and_a_single_image_decides():
    ones = torch.ones(5, dtype=torch.float64)
    assert not is_significantly_larger(ones, ones)
    assert is_significantly_larger(ones[:1] + 1e-9, ones[:1]) and not is_significantly_larger(
        ones[:1] - 1e-9, ones[:1]
    )


@pytest.mark.parametrize(
    ("before", "after", "closed_form", "trained"),
    [
        ([0.01] * 52, [0.01] * 50 + [9.0, 9.0], False, False),  # two images that explode hide in their own spread
        ([0.01] * 52, [0.01] * 51 + [9.0], False, False),
        ([1.0, 1.0], [1.9, 1.0], True, False),
        ([1.0, 1.0], [10.0, 1.0], False, False),
        ([0.0, 0.0], [1e-9, 0.0], False, False),
        ([1.0, 1.0], [1.0, 1.0], True, False),
        ([1.0, 2.0], [0.5, 2.0], True, True),
        ([1.0, 1.0], [0.1, torch.nan], False, False),
        ([1.0, 1.0], [0.1, torch.inf], False, False),
        ([torch.inf, 0.2, 0.2], [0.1, 0.1, 0.1], True, True),
        ([torch.nan, 0.2], [0.1, 0.1], True, True),
    ],
)
def test_what_is_accepted(monkeypatch, before, after, closed_form, trained):
    errors = [torch.tensor(each, dtype=torch.float64) for each in (before, after)]
    for is_closed, expected in ((True, closed_form), (False, trained)):
        monkeypatch.setattr(Spoiler, "closed_form", is_closed)
        assert is_accepted(Spoiler(), *errors) == expected


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
