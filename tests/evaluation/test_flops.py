import re

import pytest
import torch
from models import mixed, tiny_deit, tiny_swin, tiny_vit
from torch import nn

from optimum_mixrank import LowRankLinear, MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.evaluation.flops import flops_per_image, tokens_per_image


def vit_flops(tokens, hidden=32, mlp=64, blocks=2, patches=16, patch=8, classes=5):
    """By hand: a multiply-add is two FLOPs."""
    embedding = patches * hidden * 3 * patch**2
    linears = tokens * (4 * hidden**2 + 2 * hidden * mlp)
    attention = 2 * tokens**2 * hidden
    return 2 * (embedding + blocks * (linears + attention) + hidden * classes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("tiny", "tokens"), [(tiny_vit, 17), (tiny_deit, 18)], ids=["vit", "deit"])
def test_by_hand(tiny, tokens, attention):
    model = tiny()
    model.set_attn_implementation(attention)
    assert flops_per_image(model) == vit_flops(tokens)


def test_swin_by_hand():
    def block(tokens, width, window=16):
        return tokens * (4 * width**2 + 2 * width * 2 * width) + 2 * tokens * window * width

    stages = 2 * block(64, 16) + 16 * 64 * 32 + 2 * block(16, 32)
    assert flops_per_image(tiny_swin()) == 2 * (64 * 16 * 3 * 16 + stages + 32 * 5)


class Pooling(nn.Module):
    """Gives a parameter to another module, as the pooling head of VideoPrism gives its query."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 32))
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.second(x + self.first(self.query))


def test_a_module_that_is_given_a_parameter():
    model = tiny_vit()
    model.classifier = Pooling()
    assert flops_per_image(model) == vit_flops(17) + 2 * 32 * 32
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_factored_layer():
    model = tiny_vit()
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 64)
    replace_module(model, name, LowRankLinear(32, 64, rank=5))
    assert vit_flops(17) - flops_per_image(model) == 2 * 17 * (32 * 64 - 5 * (32 + 64))


@pytest.mark.parametrize(("layout", "saved"), [("factors", 0), ("pivoted", 16**2)])
def test_a_shared_factor_counts_once_and_removed_units_do_not_count(layout, saved):
    model = mixed(tiny_vit(), layout)
    shared = 16 * (3 * 32 + 32) - saved  # query, key and value as one layer
    narrow = 2 * 42 * 32  # of 64 units, every third is removed
    factored = 2 * (16 * (42 + 32) - saved)
    removed = 2 * 3 * 32**2 - 2 * shared + 2 * 2 * 64 * 32 - narrow - factored
    assert vit_flops(17) - flops_per_image(model) == 2 * 17 * removed


def test_rectangular_images():
    model = tiny_vit(image_size=[16, 32])
    assert flops_per_image(model) == vit_flops(9, patches=8)


def test_model_is_left_as_it_was():
    model = tiny_vit().train()
    flops_per_image(model.half())
    assert model.training
    assert model.dtype == torch.float16


@pytest.mark.parametrize("size", [0, [32], [32, 0]])
def test_configuration_without_size(size):
    model = tiny_vit()
    model.config.image_size = size
    message = rf"The configuration of ViTForImageClassification has image_size={re.escape(repr(size))}, which is not"
    with pytest.raises(ValueError, match=rf"{message}.*set `model.config.image_size`"):
        flops_per_image(model)


def test_tokens_per_image():
    model = tiny_swin()
    names = [target.name for target in encoder_linears(model)]
    tokens = tokens_per_image(model, names)
    # 64 patches in the first stage, 16 after the merging of patches.
    assert {count for name, count in tokens.items() if ".layers.0.blocks." in name} == {64}
    assert {count for name, count in tokens.items() if ".layers.1.blocks." in name} == {16}
    assert {count for name, count in tokens.items() if name.endswith("reduction")} == {16}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_budget_in_flops():
    compressor = MixRankCompressor(tiny_swin())
    config = MixRankConfig(
        compression_ratio=0.3, compression_scope="targets", cost="flops", metric="svd", compensation=[]
    )
    model = compressor.compress(config)
    tokens = tokens_per_image(compressor.model, [target.name for target in encoder_linears(compressor.model)])
    before = sum(
        target.shape[0] * target.shape[1] * tokens[target.name] for target in encoder_linears(compressor.model)
    )
    after = before - (flops_per_image(compressor.model) - flops_per_image(model)) / 2
    assert 0.68 * before < after <= 0.7 * before
