"""Compensation as a part of `compress`: what it needs, and what happens when it fails."""

import copy
import random

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.compensation import COMPENSATORS
from optimum_mixrank.compensation.held_out import model_outputs


def test_compressing_in_place_learns_from_the_original():
    copied, report = compress(FAMILIES["vit"](), config(compensation=["sequential"]))
    compressor = MixRankCompressor(FAMILIES["vit"]())
    inplace = compressor.compress(config(compensation=["sequential"]), list(images(64).split(16)), inplace=True)
    assert compressor.report.compensation == report.compensation
    assert all(
        torch.equal(a, b) for a, b in zip(copied.state_dict().values(), inplace.state_dict().values(), strict=True)
    )


def test_a_failure_leaves_a_model_that_is_compressed_in_place_as_it_was(monkeypatch):
    model = FAMILIES["vit"]()
    before = copy.deepcopy(model.state_dict())

    def fail(self, task):
        task.model.vit.layernorm.weight.data.mul_(2)
        raise ValueError("no luck")

    monkeypatch.setattr(COMPENSATORS["sequential"], "compensate", fail)
    for data, message in (([images(1)], "at least 2"), ([images(16)], "no luck")):
        with pytest.raises(ValueError, match=message):
            MixRankCompressor(model).compress(config(compensation=["sequential"]), data, inplace=True)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_random_model_is_refused():
    model = FAMILIES["vit"]()
    model.vit.layernorm.register_forward_hook(lambda module, args, output: output + random.random())
    with pytest.raises(ValueError, match="gives another output each time for the same images"):
        MixRankCompressor(model).compress(config(compensation=["sequential"]), [images(16)])


@pytest.mark.parametrize(
    "degenerate",
    [[torch.zeros(16, 3, 32, 32)], [images(1).expand(16, -1, -1, -1)], [images(2)], list(images(16).split(1))],
    ids=["black", "all the same", "two", "sixteen in batches of one"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_degenerate_images_give_a_finite_model(degenerate, family):
    compressor = MixRankCompressor(FAMILIES[family]())
    model = compressor.compress(config(compensation=["sequential"]), degenerate)
    assert torch.isfinite(model_outputs(model, [images(4)])[0].logits).all()


def test_compensation_needs_images():
    with pytest.raises(ValueError, match="compensation needs calibration images"):
        MixRankCompressor(FAMILIES["vit"]()).compress(config(metric="svd", compensation=["sequential"]))
