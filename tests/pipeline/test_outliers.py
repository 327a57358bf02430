"""Outlier channels, massive activations and register tokens cost no more than ordinary ones."""

import pytest
import torch
from families.catalogue import FAMILIES
from transformers import ViTConfig, ViTForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.targets import find_targets


SETTINGS = {"metric": "kfac", "structures": ["rank"], "compensation": ["sequential"], "probed_images": 0, "seed": 0}
READING = ("query", "key", "value", "intermediate.dense")


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10, initializer_range=0.15)
    return ViTForImageClassification(config).eval()


def images(seed, count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def divergence(model, **settings):
    """The divergence of the compressed model's predictions from the model's, in nats per image."""
    config = MixRankConfig(**{"compression_ratio": 0.4, **SETTINGS, **settings})
    made = MixRankCompressor(model).compress(config, [images(0, 64)]).eval()
    with torch.no_grad():
        expected, found = (each(images(1, 64)).logits.double().log_softmax(-1) for each in (model, made))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def readers(model):
    """Yield every norm with the layers that read it, by the names of modules in either line of Transformers."""
    names = {target.canonical_name: target.module for target in find_targets(model)}
    norms = dict(model.named_modules())
    for index in (0, 1):
        prefix = next(name for name in norms if name.endswith(f"{index}.layernorm_before")).removesuffix("before")
        layers = {
            end: each for name, each in names.items() for end in READING if f".{index}." in name and name.endswith(end)
        }
        yield norms[f"{prefix}before"], [layers[end] for end in READING[:3]]
        yield norms[f"{prefix}after"], [layers[READING[3]]]


@torch.no_grad()
def with_outlier_channels(model, factor=100.0):
    """Multiply channels of all norms, and divide the weights that read them: the model computes the same."""
    for norm, layers in readers(model):
        for channel in (3, 17, 40):
            norm.weight[channel] *= factor
            norm.bias[channel] *= factor
            for layer in layers:
                layer.weight[:, channel] /= factor
    return model


def test_outlier_channels_cost_no_more_than_others():
    planted = with_outlier_channels(vit())
    with torch.no_grad():
        torch.testing.assert_close(planted(images(1, 4)).logits, vit()(images(1, 4)).logits, rtol=1e-3, atol=1e-4)
    assert divergence(planted) < 1.15 * divergence(vit())


@pytest.mark.parametrize("planted", ["a channel of all tokens", "a single token"])
def test_compressing_what_massive_activations_reach_costs_little_more_than_leaving_it_dense(planted):
    model = vit()
    with torch.no_grad():
        positions = model.vit.embeddings.position_embeddings
        positions[:, 5 if planted == "a single token" else slice(None), 7] += 100.0
    dense = [f"0.{each}" for each in (*(f"attention.attention.{one}" for one in READING[:3]), READING[3])]
    losses = [divergence(model, compression_ratio=0.3, exclude_modules=names) for names in (None, dense)]
    assert losses[0] < 1.25 * losses[1]


def test_massive_register_tokens():
    family = FAMILIES["DINOv2 with registers"]
    losses = {}
    for factor in (1.0, 1000.0):
        model = family.make()
        with torch.no_grad():
            model.dinov2_with_registers.embeddings.register_tokens.mul_(factor)
        config = MixRankConfig(compression_ratio=0.3, compression_scope="targets", **SETTINGS)
        batches = family.batches(2, 32)
        made = MixRankCompressor(model).compress(config, batches[:1]).eval()
        with torch.no_grad():
            expected, found = (each(**batches[1]).logits for each in (model, made))
        losses[factor] = float((expected - found).norm() / (expected - expected.mean(0)).norm())
    assert losses[1000.0] < 1.5 * losses[1.0]
