"""Swin V2: an encoder with layers that no image passes through."""

import pytest
import torch
from compensation.cases import config, images
from models import tiny_swin, tiny_swinv2
from torch import nn
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor, find_targets


def test_layers_of_position_biases_are_not_targets():
    model = tiny_swinv2()
    names = [target.canonical_name for target in find_targets(model)]
    assert names == [target.canonical_name for target in find_targets(tiny_swin())]
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert any("continuous_position_bias_mlp" in name for name in inside)


def test_looking_for_targets_leaves_no_trace():
    model = tiny_swinv2().train()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    find_targets(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="What of SwinForImageClassification takes images is unknown"):
        find_targets(tiny_swin().to("meta"))


@pytest.mark.parametrize("metric", ["kfac", "second_moment"])
def test_compression(metric, tmp_path):
    settings = config(metric=metric, compensation=["sequential", "blocks", "distillation"], epochs=1)
    compressor = MixRankCompressor(tiny_swinv2())
    model = compressor.compress(settings, list(images(64).split(16)), save_directory=tmp_path).eval()
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(images(2)).logits, model(images(2)).logits)
