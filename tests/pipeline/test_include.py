"""What is compressed beside the linear layers of the blocks."""

import copy
import io

import pytest
import torch
from models import IMAGE_SIZE, pixels, tiny_swin, tiny_vit
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTForImageClassification,
)

from optimum_mixrank import (
    MixRankCompressor,
    MixRankConfig,
    export_model,
    find_targets,
    open_exported,
    to_dense,
    verify_model,
)
from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.checkpoint.convolution_view import ConvolutionView


ALL = ["patch_embedding", "pointwise_convolutions", "pooling", "heads", "projections"]
FAST = {"recipe": "fast", "compression_scope": "targets", "compression_ratio": 0.5}


def with_large_ends():
    """A model whose patch embedding and head are worth compressing: patches of 192 values, 40 classes."""
    return tiny_vit(num_labels=40)


def output(model, images):
    with torch.no_grad():
        found = model(pixel_values=images)
    return found.logits if "logits" in found else found[0]


def entries(model) -> set[str]:
    return set(model.config.quantization_config.rank_map)


PATCHES = "embeddings.patch_embeddings.projection.linear"


@pytest.mark.parametrize("settings", [FAST, {**FAST, "recipe": "best", "probed_images": 8}], ids=["fast", "best"])
def test_patch_embedding_and_head_of_a_vit(settings, tmp_path):
    original = with_large_ends()
    before, state = output(original, pixels()), {name: each.clone() for name, each in original.state_dict().items()}
    compressor = MixRankCompressor(original)
    config = MixRankConfig(include=["patch_embedding", "heads"], **settings)
    model = compressor.compress(config, [pixels(16), pixels(16, seed=1)], tmp_path / "out")
    assert {PATCHES, "classifier"} <= entries(model)
    assert isinstance(model.vit.embeddings.patch_embeddings.projection, ConvolutionView)

    # The original is what it was.
    assert type(original.vit.embeddings.patch_embeddings.projection) is nn.Conv2d
    assert torch.equal(output(original, pixels()), before)
    assert all(torch.equal(each, state[name]) for name, each in original.state_dict().items())

    expected = output(model, pixels())
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(output(reloaded, pixels()), expected)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["vit.embeddings.patch_embeddings.projection.weight"].numel() == 0, "plain programs must stop here"
    saved_again = tmp_path / "again"
    reloaded.save_pretrained(saved_again)
    assert torch.equal(output(ViTForImageClassification.from_pretrained(saved_again), pixels()), expected)
    layers = {layer.name: layer for layer in compressor.report.layers}
    assert layers[PATCHES].rank and layers["classifier"].rank

    half = ViTForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert output(half, pixels().bfloat16()).dtype == torch.bfloat16
    dense = to_dense(reloaded)
    assert type(dense.vit.embeddings.patch_embeddings.projection) is nn.Conv2d
    torch.testing.assert_close(output(dense, pixels()), expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "config.json").read_text().count("mixrank")


def test_including_them_lowers_what_the_blocks_have_to_give():
    original, images = with_large_ends(), [pixels(16)]
    sizes = [
        MixRankCompressor(original).compress(
            MixRankConfig(recipe="fast", compression_ratio=0.5, include=include), images
        )
        for include in ([], ["patch_embedding", "heads"])
    ]
    assert abs(sizes[0].num_parameters() - sizes[1].num_parameters()) < 0.02 * original.num_parameters()
    assert entries(sizes[0]) < entries(sizes[1])


def test_compressed_in_place_and_trained():
    original = with_large_ends()
    model = MixRankCompressor(original).compress(MixRankConfig(include=ALL, **FAST), [pixels(16)], inplace=True)
    assert model is original
    view = model.vit.embeddings.patch_embeddings.projection
    model.train().requires_grad_(True)
    assert not view.weight.requires_grad
    model(pixel_values=pixels(), labels=torch.arange(4)).loss.backward()
    assert view.linear.factor_a.weight.grad.abs().sum() > 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied.eval(), pixels()), output(model.eval(), pixels()))


def test_a_failure_leaves_the_original_as_it_was():
    original = with_large_ends()
    for inplace in (False, True):
        with pytest.raises(ValueError, match="NaN or Inf"):
            config = MixRankConfig(include=ALL, **FAST)
            MixRankCompressor(original).compress(config, [pixels(4) * torch.nan], inplace=inplace)
        assert type(original.vit.embeddings.patch_embeddings.projection) is nn.Conv2d


def test_what_stays_dense_stays_a_convolution(tmp_path):
    config = MixRankConfig(include=["patch_embedding"], ratio_pattern={"projection.linear": 0}, **FAST)
    model = MixRankCompressor(tiny_vit()).compress(config, [pixels(16)], tmp_path)
    assert type(model.vit.embeddings.patch_embeddings.projection) is nn.Conv2d and PATCHES not in entries(model)
    assert torch.equal(output(ViTForImageClassification.from_pretrained(tmp_path), pixels()), output(model, pixels()))


def test_all_convolutions_of_a_convnext(tmp_path):
    sizes = {"image_size": IMAGE_SIZE, "hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "num_labels": 40}
    torch.manual_seed(0)
    original = ConvNextForImageClassification(ConvNextConfig(**sizes)).eval()
    model = MixRankCompressor(original).compress(MixRankConfig(include=ALL, **FAST), [pixels(16)], tmp_path)
    names = entries(model)
    assert {
        "embeddings.patch_embeddings.linear",
        "encoder.stages.1.downsampling_layer.1.linear",
        "classifier",
    } <= names
    assert torch.equal(
        output(ConvNextForImageClassification.from_pretrained(tmp_path), pixels()), output(model, pixels())
    )


def test_bottlenecks_of_a_resnet(tmp_path):
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "bottleneck"}
    original = ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes)).eval()
    images = [torch.randn(16, 3, 32, 32)]
    with pytest.raises(ValueError, match=r"can be compressed with include=\['pointwise_convolutions'\]"):
        MixRankCompressor(original).compress(MixRankConfig(**FAST), images)
    config = MixRankConfig(include=["pointwise_convolutions"], **FAST)
    model = MixRankCompressor(original).compress(config, images, tmp_path)
    assert entries(model) and all(name.endswith("convolution.linear") for name in entries(model))
    assert torch.equal(
        output(ResNetForImageClassification.from_pretrained(tmp_path), images[0]), output(model, images[0])
    )


VISION = {
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("cls", "config", "include", "expected"),
    [
        (
            CLIPVisionModelWithProjection,
            CLIPVisionConfig(projection_dim=32, **VISION),
            "projections",
            "visual_projection",
        ),
        (SiglipVisionModel, SiglipVisionConfig(**VISION), "pooling", "head.mlp.fc1"),
        (SiglipVisionModel, SiglipVisionConfig(**VISION), "patch_embedding", "embeddings.patch_embedding.linear"),
    ],
    ids=["CLIP", "SigLIP's pooling", "SigLIP's patches"],
)
def test_towers(cls, config, include, expected, tmp_path):
    torch.manual_seed(0)
    original = cls(copy.deepcopy(config)).eval()
    plain = entries(MixRankCompressor(original).compress(MixRankConfig(**FAST), [pixels(16)]))
    model = MixRankCompressor(original).compress(MixRankConfig(include=[include], **FAST), [pixels(16)], tmp_path)
    added = entries(model) - plain
    assert added and any(name.endswith(expected) for name in added), added
    assert torch.equal(cls.from_pretrained(tmp_path)(pixel_values=pixels())[0], model(pixel_values=pixels())[0])


def test_statistics_of_included_layers_are_used_again():
    original, images = with_large_ends(), [pixels(16)]
    compressor, include = MixRankCompressor(original), ["patch_embedding", "heads"]
    calibration = compressor.calibrate(images, include=include)
    config = MixRankConfig(include=include, **FAST)
    model = compressor.compress(config, calibration=calibration)
    assert {PATCHES, "classifier"} <= entries(model)
    compressor.check_calibration(calibration, images, include=include)
    profile = compressor.profile(calibration, config, [0.4])
    assert {PATCHES, "classifier"} <= set(profile.points[0].choices)
    assert compressor.memory_plan(config, 16) is not None


def test_a_model_of_the_same_size_with_everything_included():
    original = with_large_ends()
    target = round(0.5 * original.num_parameters())
    config = MixRankConfig(recipe="fast", target_parameters=target, include=ALL)
    found = MixRankCompressor(original).compress(config, [pixels(16)]).num_parameters()
    assert 0.98 * target <= found <= target


def test_a_checkpoint_brings_the_code_of_its_views(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    model = compressor.compress(MixRankConfig(include=["patch_embedding"], **FAST), [pixels(16)])
    compressor.save_pretrained(model, tmp_path, self_contained=True)
    assert "class ConvolutionView" in (tmp_path / "modeling_mixrank.py").read_text()
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(output(reloaded, pixels()), output(model, pixels()))


def test_views_are_exported_for_batches_of_any_size(tmp_path):
    model = MixRankCompressor(with_large_ends()).compress(MixRankConfig(include=ALL, **FAST), [pixels(16)])
    file = export_model(model, tmp_path / "out", "torch").file
    assert verify_model(model, open_exported(file), [Batch(pixels(5)), Batch(pixels(2))]).is_ok


def test_layers_outside_of_the_blocks_are_found_only_if_they_are_included():
    model = tiny_swin()
    inside = {target.canonical_name for target in find_targets(model)}
    assert {target.canonical_name for target in find_targets(model, include=["heads"])} - inside == {"classifier"}


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (["head"], "include has 'head', which is unknown; choose among 'patch_embedding'"),
        ("heads", "include='heads' is not a list; name what to compress"),
    ],
)
def test_what_can_be_included_is_named(include, message):
    with pytest.raises(ValueError, match=message):
        MixRankConfig(include=include)


def test_a_checkpoint_that_includes_what_a_later_version_knows_opens():
    stored = {**MixRankConfig(include=["heads"]).to_dict(), "include": ["positions"]}
    stored["rank_map"] = {"classifier": {"rank": 2, "bias": True, "layout": "factors"}}
    assert MixRankConfig.from_dict(stored).include == ["positions"]
