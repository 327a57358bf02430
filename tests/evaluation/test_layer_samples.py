"""Layers to be timed: which there are, and that they are what the model would run."""

import pytest
import torch
from models import pixels, tiny_vit
from torch import nn

from optimum_mixrank.calibration.sites import Mlp, find_sites
from optimum_mixrank.calibration.targets import find_targets
from optimum_mixrank.checkpoint.modeling import LowRankLinear
from optimum_mixrank.checkpoint.names import Target
from optimum_mixrank.checkpoint.pivoted import PivotedLinear
from optimum_mixrank.checkpoint.shared import SharedLinear
from optimum_mixrank.evaluation.flops import tokens_per_image
from optimum_mixrank.evaluation.layer_samples import Passing, SampleGroup, find_activations, sample, sample_groups


@pytest.fixture(scope="module")
def groups():
    model = tiny_vit()
    targets = find_targets(model)
    sites = find_sites(model, targets, ["shared", "width"])
    mlps = [site for site in sites if isinstance(site, Mlp)]
    activations = find_activations(model, mlps, pixels(1))
    assert len(activations) == 2
    tokens = tokens_per_image(model, [target.name for target in targets])
    found = sample_groups(targets, sites, tokens, {name: module for name, (_, module) in activations.items()})
    return {(group.target.shape, group.side): group for group in found}


def test_the_first_layer_of_an_mlp_comes_with_its_activation(groups):
    after = {key: group.after for key, group in groups.items()}
    assert type(after.pop(((64, 32), "out"))).__name__ == "GELUActivation"
    assert set(after.values()) == {None}


@pytest.mark.parametrize(
    ("layout", "rank", "kind"), [(None, None, nn.Linear), ("pivoted", 8, PivotedLinear), ("factors", 8, LowRankLinear)]
)
def test_samples(groups, layout, rank, kind):
    module = sample(groups[(64, 32), "out"], 24, layout, rank, keep=True)
    # As many copies as the model has such layers.
    assert [type(part) for parts in module.copies for part in parts] == [kind, kind]
    assert [each.shape for each in module(torch.randn(2, 5, 32))] == [(2, 5, 24)] * 2
    second = sample(groups[(32, 64), "in"], 24, layout, rank, keep=True)
    assert [each.shape for each in second(torch.randn(2, 5, 24))] == [(2, 5, 32)] * 2


def test_several_layers_as_one(groups):
    group = groups[(96, 32), ""]
    dense, shared = (sample(group, 96, *each, keep=True) for each in ((None, None), ("pivoted", 8)))
    assert {type(part) for parts in dense.copies for part in parts} == {nn.Linear}
    assert {type(part) for parts in shared.copies for part in parts} == {SharedLinear}
    for module in (dense, shared):
        assert [each.shape for each in module(torch.randn(2, 5, 32))] == [(2, 5, 32)] * 6


def test_sizes_and_ranks_are_multiples_of_8_where_that_can_be():
    target = Target("a", "a", nn.Linear(384, 1536))
    group = SampleGroup(target, 12, 65, "out")
    assert group.sizes((0.125, 0.4)) == (192, 616, 1536)
    assert group.ranks(1536, "pivoted", (0.03, 0.5, 1.0)) == (8, 192, 384)
    assert group.ranks(1536, "factors", (0.5, 1.0)) == (152, 304)
    assert group.ranks(384, "pivoted", (1.0,)) == (383,)
    # Gates and values lose the same units.
    assert SampleGroup(target, 12, 65, "out", chunks=2).sizes((0.4,)) == (2 * 304, 1536)
    assert SampleGroup(Target("b", "b", nn.Linear(4, 6)), 1, 5, "out").ranks(2, "pivoted", (1.0,)) == (1,)


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_passing_layers_keep_the_shape(rows):
    dense = nn.Linear(8, rows)
    assert Passing(dense)(torch.randn(2, 5, 8)).shape == dense(torch.randn(2, 5, 8)).shape
