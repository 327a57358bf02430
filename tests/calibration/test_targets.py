"""Which layers are found, under which canonical names, whatever the class and the head of the model."""

import logging

import pytest
import torch
import transformers
from models import AWKWARD, tiny_deit, tiny_swin, tiny_vit
from torch import nn
from transformers import ViTForImageClassification

from optimum_mixrank import LowRankLinear, find_targets
from optimum_mixrank.calibration.targets import encoder_linears, match_values
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.runtime.inputs import ModelInputs
from optimum_mixrank.runtime.outputs import ModelCall


# As they stand in checkpoints of all releases; literal, since the stored rank map depends on them.
VIT_NAMES = [
    f"encoder.layer.{index}.{name}"
    for index in range(2)
    for name in (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
SWIN_BLOCK = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
SWIN_NAMES = [
    *(f"encoder.layers.0.blocks.{block}.{name}" for block in range(2) for name in SWIN_BLOCK),
    "encoder.layers.0.downsample.reduction",
    *(f"encoder.layers.1.blocks.{block}.{name}" for block in range(2) for name in SWIN_BLOCK),
]
MASKED = {"encoder_stride": 8}
MODELS = {
    "ViTForImageClassification": (tiny_vit, {}, VIT_NAMES),
    "ViTModel": (tiny_vit, {}, VIT_NAMES),
    "ViTForMaskedImageModeling": (tiny_vit, MASKED, VIT_NAMES),
    "DeiTForImageClassification": (tiny_deit, {}, VIT_NAMES),
    "DeiTForImageClassificationWithTeacher": (tiny_deit, {}, VIT_NAMES),
    "DeiTModel": (tiny_deit, {}, VIT_NAMES),
    "DeiTForMaskedImageModeling": (tiny_deit, MASKED, VIT_NAMES),
    "SwinForImageClassification": (tiny_swin, {}, SWIN_NAMES),
    "SwinModel": (tiny_swin, {}, SWIN_NAMES),
    "SwinForMaskedImageModeling": (tiny_swin, MASKED, SWIN_NAMES),
    "SwinBackbone": (tiny_swin, {"out_features": ["stage1", "stage2"]}, SWIN_NAMES),
}


def build(name):
    make, changes, _ = MODELS[name]
    return make(getattr(transformers, name), **changes)


def canonical(targets):
    return [target.canonical_name for target in targets]


@pytest.mark.parametrize("name", MODELS)
def test_all_encoder_linears_and_nothing_else(name):
    model = build(name)
    targets = find_targets(model)
    assert canonical(targets) == MODELS[name][2]
    for target in targets:
        assert model.get_submodule(target.name) is target.module
        assert target.shape == tuple(target.module.weight.shape)
    found = {target.name for target in targets}
    left = {each for each, module in model.named_modules() if isinstance(module, nn.Linear)} - found
    assert all(
        each.rpartition(".")[2] in ("classifier", "cls_classifier", "distillation_classifier", "dense")
        for each in left
    )
    assert all("pooler" in each for each in left if each.endswith("dense"))


def test_awkward_sizes():
    shapes = {target.canonical_name.rpartition("0.")[2]: target.shape for target in find_targets(tiny_vit(**AWKWARD))}
    assert shapes["attention.attention.query"] == (36, 36)
    assert shapes["intermediate.dense"] == (60, 36)
    assert shapes["output.dense"] == (36, 60)


def test_swin_reductions_are_targets_without_bias():
    [reduction] = find_targets(tiny_swin(), ["reduction"])
    assert reduction.shape == (32, 64)
    assert reduction.module.bias is None


QUERIES = [VIT_NAMES[0], VIT_NAMES[6]]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, VIT_NAMES),
        ("all-linear", VIT_NAMES),
        (["query"], QUERIES),
        (["attention.query"], QUERIES),
        (["query", "key"], [*VIT_NAMES[0:2], *VIT_NAMES[6:8]]),
        (["key", "query", "query"], [*VIT_NAMES[0:2], *VIT_NAMES[6:8]]),
        (["attention.output.dense"], [VIT_NAMES[3], VIT_NAMES[9]]),
        (["output.dense"], [VIT_NAMES[3], VIT_NAMES[5], VIT_NAMES[9], VIT_NAMES[11]]),
        (["encoder.layer.1.output.dense"], [VIT_NAMES[11]]),
        (["layer.1.output.dense", "layer.0.intermediate.dense"], [VIT_NAMES[4], VIT_NAMES[11]]),
        (r".*\.1\..*", VIT_NAMES[6:]),
        (r".*(query|key)", [*VIT_NAMES[0:2], *VIT_NAMES[6:8]]),
        (r"encoder\.layer\.0\..*", VIT_NAMES[:6]),
        (r".*layers?\.\d\.output\.dense", [VIT_NAMES[5], VIT_NAMES[11]]),
    ],
    ids=str,
)
def test_target_modules(patterns, expected):
    model = tiny_vit()
    assert canonical(find_targets(model, patterns)) == expected
    if patterns not in (None, "all-linear"):
        rest = [name for name in VIT_NAMES if name not in expected]
        assert canonical(find_targets(model, None, patterns)) == rest


def test_module_names_match_too():
    model = tiny_vit()
    last_part = encoder_linears(model)[0].name.rpartition(".")[2]
    assert canonical(find_targets(model, [last_part])) == QUERIES
    assert match_values(encoder_linears(model), {last_part: 3}, "rank_pattern") == dict.fromkeys(QUERIES, 3)
    target = encoder_linears(model)[3]
    assert find_targets(model, [target.name]) == [target]
    assert find_targets(model, target.name.replace(".", r"\.")) == [target]


def test_a_regular_expression_must_match_the_whole_name():
    with pytest.raises(ValueError, match="target_modules has 'query', which matches no linear layer"):
        find_targets(tiny_vit(), "query")


def test_exclusion_wins():
    targets = find_targets(tiny_vit(), ["query", "key"], r".*\.0\..*")
    assert canonical(targets) == VIT_NAMES[6:8]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("patterns", ["querry", ["query", "querry"], ["uery"], ["classifier"]], ids=str)
def test_a_pattern_that_matches_nothing_lists_the_names(field, patterns):
    pattern = patterns if isinstance(patterns, str) else patterns[-1]
    with pytest.raises(ValueError) as error:
        find_targets(tiny_vit(), **{field: patterns})
    message = str(error.value)
    assert message.startswith(f"{field} has {pattern!r}, which matches no linear layer.")
    assert "encoder.layer.*.attention.attention.query, encoder.layer.*.attention.attention.key" in message
    assert "classifier" not in message.partition("Layers are called")[2]


def test_everything_excluded():
    message = r"exclude_modules='\.\*' excludes all 2 layers that target_modules=\['query'\] includes\. Narrow it"
    with pytest.raises(ValueError, match=message):
        find_targets(tiny_vit(), ["query"], ".*")
    with pytest.raises(ValueError, match="excludes all 12 layers"):
        find_targets(tiny_vit(), None, "all-linear")


@pytest.mark.parametrize("search", [find_targets, encoder_linears])
def test_a_compressed_model_is_refused(search):
    model = tiny_vit()
    target = encoder_linears(model)[4]
    replace_module(model, target.name, LowRankLinear(*reversed(target.shape), 3))
    with pytest.raises(ValueError, match=r"ViTForImageClassification is compressed already.*to_dense\(model\)"):
        search(model)


def test_a_model_without_a_stack_of_blocks_is_refused():
    class NoEncoder(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self):
            super().__init__(transformers.PretrainedConfig())
            self.linear = nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"NoEncoder has no linear layer inside a stack of blocks"):
        encoder_linears(NoEncoder())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, {}),
        ({"query": 3}, dict.fromkeys(QUERIES, 3)),
        ({"encoder.layer.0.output.dense": 3}, {VIT_NAMES[5]: 3}),
        ({r"layer\.\d\.output\.dense": 3}, {VIT_NAMES[5]: 3, VIT_NAMES[11]: 3}),
        ({"query|key": 3}, dict.fromkeys([*VIT_NAMES[0:2], *VIT_NAMES[6:8]], 3)),
        ({r"1.*query": 5, "query": 3}, {VIT_NAMES[6]: 5, VIT_NAMES[0]: 3}),
        ({"query": 3, r"1.*query": 5}, dict.fromkeys(QUERIES, 3)),
        ({".*": 2}, dict.fromkeys(VIT_NAMES, 2)),
    ],
    ids=str,
)
def test_match_values(pattern, expected):
    assert match_values(find_targets(tiny_vit()), pattern, "rank_pattern") == expected


@pytest.mark.parametrize("key", ["uery", "querry", "classifier", "encoder.layer.0", "layer.2.*"])
def test_a_key_that_matches_nothing(key):
    with pytest.raises(ValueError) as error:
        match_values(find_targets(tiny_vit()), {"query": 1, key: 3}, "rank_pattern")
    assert f"rank_pattern has the key {key!r}, which matches no targeted layer. Layers are called" in str(error.value)


def test_a_key_for_a_layer_that_is_not_a_target():
    with pytest.raises(ValueError, match="ratio_pattern has the key 'key', which matches no targeted layer"):
        match_values(find_targets(tiny_vit(), ["query"]), {"key": 0.5}, "ratio_pattern")


def test_finding_targets_changes_nothing():
    model = tiny_swin()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_targets(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_guessed_of_a_model_that_does_not_run():
    model = tiny_vit()
    model.config.image_size = 31
    with pytest.raises(ValueError, match=r"What of ViTForImageClassification takes images is unknown.*31\*31"):
        find_targets(model)
    assert canonical(find_targets(model, ["query"])) == QUERIES


def test_what_images_reach_in_a_model_that_blocks_gradients():
    """The example is the very noise that it is compared with."""

    class Blocking(ViTForImageClassification):
        def forward(self, pixel_values):
            return super().forward(pixel_values.detach())

    model = tiny_vit(Blocking)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert len(encoder_linears(model, ModelCall(example=ModelInputs(images)))) == len(VIT_NAMES)


def test_the_size_of_a_backbone(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optimum_mixrank"), "propagate", True)
    sizes = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "window_size": 4,
        "depths": [1] * 4,
        "num_heads": [1] * 4,
    }
    backbone = transformers.Swinv2Config(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
    heads = {"hidden_size": 8, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "pool_scales": [1]}
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=3, **heads)
    found = find_targets(transformers.UperNetForSemanticSegmentation(config).eval())
    assert found and not any("continuous_position_bias" in target.name for target in found)
    assert "is unknown" not in caplog.text


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_clip():
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    text = {**TOWER, "vocab_size": 99, "max_position_embeddings": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()


def test_of_two_towers_images_reach_one():
    model = tiny_clip()
    found = canonical(find_targets(model))
    assert len(found) == 12 and all(name.startswith("vision_model.") for name in found)
    assert canonical(find_targets(model, ["fc1"])) == [name for name in found if name.endswith("fc1")]


def test_layers_that_images_do_not_reach_are_targets_if_they_are_named():
    found = canonical(find_targets(tiny_clip(), r"text_model\..*fc1"))
    assert found == [f"text_model.encoder.layers.{index}.mlp.fc1" for index in range(2)]


def test_a_text_model_and_a_convolutional_network_are_refused_as_what_they_are():
    bert = transformers.BertModel(transformers.BertConfig(**TOWER, vocab_size=99))
    with pytest.raises(ValueError, match="BertModel is a text model"):
        find_targets(bert)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    with pytest.raises(ValueError, match=r"ResNetForImageClassification .* is a convolutional network"):
        find_targets(resnet)


def test_a_layer_whose_weight_is_used_without_a_call_is_left_out(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optimum_mixrank"), "propagate", True)
    caplog.set_level(logging.INFO, "optimum_mixrank")
    model = tiny_vit()
    layer = encoder_linears(model)[4]

    class Functional(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, hidden):
            return nn.functional.linear(hidden, self.linear.weight, self.linear.bias)

    replace_module(model, layer.name, Functional(layer.module))
    assert len(find_targets(model)) == len(VIT_NAMES) - 1
    assert "Left out, since they are not called when images are" in caplog.text
