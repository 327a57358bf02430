"""Convolutions of patches that do not overlap, seen as linear layers."""

import copy

import pytest
import torch
from torch import nn

from optimum_mixrank.checkpoint.convolution_view import ConvolutionView
from optimum_mixrank.checkpoint.modeling import Guard
from optimum_mixrank.checkpoint.views import include_views, layers_in_views, remove_dense_views


CASES = {
    "patches": (nn.Conv2d(3, 7, 4, stride=4), (2, 3, 8, 12)),
    "patches with a rest": (nn.Conv2d(3, 7, (2, 4), stride=(2, 4), bias=False), (2, 3, 9, 14)),
    "pixels": (nn.Conv2d(5, 7, 1), (2, 5, 4, 6)),
    "every other pixel": (nn.Conv2d(5, 7, 1, stride=(2, 3)), (2, 5, 5, 7)),
    "clips": (nn.Conv3d(3, 7, (2, 4, 4), stride=(2, 4, 4)), (2, 3, 4, 8, 8)),
    "sequences": (nn.Conv1d(3, 7, 1), (2, 3, 9)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_view_computes_what_the_convolution_does_and_becomes_it_again(case):
    conv, shape = CASES[case]
    conv, images = copy.deepcopy(conv).double(), torch.randn(shape, dtype=torch.float64)
    expected = conv(images)
    view = ConvolutionView.of(conv)
    found = view(images)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    assert view.linear.weight.data_ptr() == conv.weight.data_ptr(), "no values are copied"
    assert view.weight.numel() == 0 and isinstance(view.weight, Guard) and view.weight.dtype == torch.float64
    again = view.plain()
    assert type(again) is type(conv) and str(again) == str(conv)
    assert torch.equal(again(images), expected)


def test_a_frozen_weight_is_rounded_like_a_trainable_one():
    """As the backbone of DETR, which is frozen when it is made and trainable when it is read."""
    conv = nn.Conv2d(8, 4, 1, stride=2, bias=False)
    images = torch.randn(4, 8, 16, 16)
    with torch.no_grad():
        trainable = ConvolutionView.of(conv)(images)
        assert torch.equal(ConvolutionView.of(conv.requires_grad_(False))(images), trainable)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.Conv2d(4, 4, 2, stride=2, padding=1),
        nn.Conv2d(4, 4, 2, stride=2, dilation=2),
        nn.Conv2d(4, 4, 1, padding="same"),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.Linear(4, 4),
        type("Own", (nn.Conv2d,), {})(4, 4, 1),
    ],
    ids=["overlap", "groups", "padding", "dilation", "same", "transposed", "linear", "subclass"],
)
def test_a_layer_that_is_not_a_linear_map_of_patches_has_no_view(module):
    assert ConvolutionView.kind(module) is None


def test_kinds_are_included_by_name_and_removed_again():
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 3))
    images, before = torch.randn(2, 3, 16, 16), list(model)
    expected = model(images)
    replaced = include_views(model, ["pointwise_convolutions"])
    assert replaced == {"1": before[1]} and layers_in_views(model) == {"1.linear"}
    torch.testing.assert_close(model(images), expected)
    remove_dense_views(model)
    assert [type(each) for each in model] == [nn.Conv2d] * 3
    assert set(include_views(model, ["patch_embedding", "pointwise_convolutions"])) == {"0", "1"}


def test_a_convolution_in_two_places_stays_one():
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared)
    assert set(include_views(model, ["pointwise_convolutions"])) == {"1"}
