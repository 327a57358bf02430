"""Models of timm inside Transformers' wrappers; they need timm and torchvision, in an environment of their own."""

import dataclasses
import json
import logging
import os

import numpy as np
import pytest
import torch
from commands.calling import cli
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.sites import Mlp, find_sites
from optimum_mixrank.calibration.targets import find_targets
from optimum_mixrank.decomposition.kfac import KfacMetric

from .checks import check_family, settings
from .timm_catalogue import TIMM_FAMILIES


try:
    import timm
    import torchvision  # noqa: F401 - the wrapper's image processor needs it
    from transformers import TimmWrapperForImageClassification, TimmWrapperModel
except (ImportError, RuntimeError) as error:
    # In the environment that is made for these tests they must not be passed over.
    if os.environ.get("MIXRANK_TEST_TIMM"):
        raise
    pytest.skip(f"timm and torchvision are needed: {error}", allow_module_level=True)

EVERY_STEP = ["ViT", "DINOv2, SwiGLU", "EVA-02, separate q, k, v", "Swin", "ConvNeXt", "LeViT"]
KINDS = ("compress", "reload", "dense", "train")


REFUSED = [name for name, family in TIMM_FAMILIES.items() if family.refused]
OF_CONVOLUTIONS = ["ConvFormer", "FastViT, attention", "FastViT, MobileCLIP", "SwiftFormer", "ViT, hybrid"]
"""Those with few linear layers."""


@pytest.mark.parametrize("name", [name for name in TIMM_FAMILIES if name not in REFUSED])
def test_an_architecture(name):
    recipe = {} if name in EVERY_STEP else {"recipe": "fast", "compensation": ["sequential"]}
    results = check_family(TIMM_FAMILIES[name], settings(**recipe))
    assert {kind: results[kind] for kind in KINDS} == dict.fromkeys(KINDS, "yes")
    assert results["targeted"] > (0.05 if name in OF_CONVOLUTIONS else 0.4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_consists_of_convolutions_is_refused_as_that(name):
    with pytest.raises(ValueError, match="is a convolutional network.*include=.'pointwise_convolutions'"):
        check_family(TIMM_FAMILIES[name], settings(recipe="fast", compensation=[]))


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_the_budget_counts_the_whole_model(recipe):
    family = TIMM_FAMILIES["ViT"]
    model = family.make()
    made = MixRankCompressor(model).compress(
        settings(recipe=recipe, compression_ratio=0.4, compression_scope="model"), family.batches()
    )
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, made)]
    assert 0.57 * sizes[0] <= sizes[1] <= 0.6 * sizes[0]


def test_images_of_one_channel():
    family = dataclasses.replace(TIMM_FAMILIES["ViT"], arguments={**TIMM_FAMILIES["ViT"].arguments, "in_chans": 1})
    images = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    made = MixRankCompressor(family.make()).compress(settings(recipe="fast", compensation=[]), [images])
    assert made(images).logits.shape == (8, 5)


@pytest.mark.parametrize(
    ("name", "left_out"), [("BEiT", 2), ("EVA-02", 2), ("Swin V2", None), ("ViT", 0), ("EVA-02, separate q, k, v", 0)]
)
def test_layers_whose_weight_is_used_without_a_call_are_left_out_with_one_line(name, left_out, caplog):
    model = TIMM_FAMILIES[name].make()
    with caplog.at_level(logging.INFO, logger="optimum_mixrank"):
        names = {target.canonical_name for target in find_targets(model)}
    every = {name for name, module in model.timm_model.named_modules() if name.endswith("attn.qkv")}
    missing = every - names
    assert len(missing) == (len(every) if left_out is None else left_out)
    lines = [each for each in caplog.messages if "they are not called when images are" in each]
    assert len(lines) == bool(missing)
    assert all("attn.qkv" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "packed"), [("DINOv2, SwiGLU", True), ("DINOv3, SwiGLU", False), ("EVA-02, base", None)]
)
def test_units_of_a_swiglu_are_removed_only_where_nothing_else_needs_them(name, packed):
    model = TIMM_FAMILIES[name].make()
    mlps = [site for site in find_sites(model, find_targets(model), ["shared", "width"]) if isinstance(site, Mlp)]
    # The hidden units of the base model of EVA-02 are normalised together.
    assert [mlp.has_fused_gate for mlp in mlps] == ([] if packed is None else [packed] * 2)


def test_units_of_a_packed_swiglu_are_removed_in_pairs():
    family = TIMM_FAMILIES["DINOv2, SwiGLU"]
    config = settings(structures=["width"], compensation=["sequential"], target_modules=["fc1", "fc2"])
    made = MixRankCompressor(family.make()).compress(config, family.batches())
    for block in made.timm_model.blocks:
        assert block.mlp.fc1.out_features == 2 * block.mlp.fc2.in_features
    assert any(block.mlp.fc2.in_features < 64 for block in made.timm_model.blocks)


def vit_of_both():
    """A ViT of Transformers, and one of timm with the same weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    separate = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)).eval()
    fused = TIMM_FAMILIES["ViT"].make()
    state = {}
    for kind in ("weight", "bias"):
        for old, new in (("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("layernorm", "norm")):
            state[f"{new}.{kind}"] = separate.vit.get_submodule(old).get_parameter(kind)
        state[f"head.{kind}"] = separate.classifier.get_parameter(kind)
        for index, block in enumerate(separate.vit.layers):
            attention = block.attention
            qkv = [each.get_parameter(kind) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(qkv)
            for module, new in (
                (attention.o_proj, "attn.proj"),
                (block.mlp.fc1, "mlp.fc1"),
                (block.mlp.fc2, "mlp.fc2"),
                (block.layernorm_before, "norm1"),
                (block.layernorm_after, "norm2"),
            ):
                state[f"blocks.{index}.{new}.{kind}"] = module.get_parameter(kind)
    embeddings = separate.vit.embeddings
    state["cls_token"], state["pos_embed"] = embeddings.cls_token, embeddings.position_embeddings
    fused.timm_model.load_state_dict(state)
    for module in fused.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = separate.config.layer_norm_eps
    return separate, fused


def test_fused_queries_keys_and_values_are_measured_as_the_joint_layer_of_separate_ones():
    separate, fused = vit_of_both()
    batches = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        assert torch.allclose(separate(batches[0]).logits, fused(batches[0]).logits, atol=1e-5)
    joint = MixRankCompressor(separate).calibrate(batches, "kfac", structures=["rank", "shared"])
    single = MixRankCompressor(fused).calibrate(batches, "kfac", structures=["rank", "shared"])
    names = {index: next(each for each in joint.layers if f"{index}" in each and "+" in each) for index in (0, 1)}
    weights = {target.canonical_name: target.module.weight.detach().double() for target in find_targets(fused)}
    for index, name in names.items():
        weight = weights[f"blocks.{index}.attn.qkv"]
        expected, found = (
            KfacMetric(damping=1e-9).decompose(weight, statistics).energies
            for statistics in (joint.layers[name], single.layers[f"timm_model.blocks.{index}.attn.qkv"])
        )
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected[0]))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A folder as timm writes it, which says nothing of Transformers."""
    folder = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    timm.models.save_for_hf(model, folder, model_config={"label_names": ["cat", "dog"]}, safe_serialization=True)
    assert "model_type" not in json.loads((folder / "config.json").read_text())
    return folder, model


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


def test_a_checkpoint_of_timm_itself(native, tmp_path):
    folder, model = native
    compressor = MixRankCompressor.from_pretrained(folder)
    assert type(compressor.model) is TimmWrapperForImageClassification
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(compressor.model(images).logits, model(images))
    config = MixRankConfig(compression_ratio=0.3, recipe="fast")
    made = compressor.compress(config, [images], save_directory=tmp_path / "small")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "small")
    assert processor.data_config == compressor.image_processor.data_config
    with torch.no_grad():
        expected = made.eval()(images).logits
        for auto_class in (AutoModelForImageClassification, TimmWrapperForImageClassification):
            assert torch.equal(auto_class.from_pretrained(tmp_path / "small").eval()(images).logits, expected)
        encoder = TimmWrapperModel.from_pretrained(tmp_path / "small").eval()
        features = encoder(images).pooler_output
        assert torch.allclose(made.timm_model.head(features), expected, atol=1e-5)


def test_a_checkpoint_of_timm_without_classes_opens_as_an_encoder(tmp_path):
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert type(MixRankCompressor.from_pretrained(tmp_path).model) is TimmWrapperModel


def test_the_command_line(native, photographs, tmp_path):
    folder, _ = native
    dataset = ("--dataset", photographs)
    stdout, _ = cli("plan", "--model", folder, *dataset, "--num-samples", 8, "--recipe", "fast")
    assert "qkv" in stdout
    small = tmp_path / "small"
    cli("compress", "--model", folder, *dataset, "--num-samples", 8, "--recipe", "fast", "--output", small)
    stdout, _ = cli("inspect", small)
    assert "0.attn.qkv" in stdout
    stdout, _ = cli("evaluate", "--model", small, "--reference", folder, *dataset)
    assert "top-1 accuracy" in stdout
