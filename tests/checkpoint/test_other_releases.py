"""A rank map is read under the names that another release of Transformers has for the modules around a stack of blocks."""

import json
import re

import pytest
import torch
import transformers
from families.catalogue import FAMILIES
from families.checks import settings
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.targets import find_targets
from optimum_mixrank.checkpoint.entries import compressed_layers
from optimum_mixrank.checkpoint.other_releases import read_renamed, under_present_names
from optimum_mixrank.checkpoint.rank_map import FactoredLayer


CONFIG = settings(metric="kfac", recipe="fast", structures=["rank", "shared"], compensation=[])


@pytest.fixture(scope="module", params=["CLIP, tower", "SigLIP2, tower", "RT-DETR", "CLIP"])
def saved(request, tmp_path_factory):
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("saved")
    batch = family.batches(1, 2)[0]
    made = MixRankCompressor(family.make()).compress(CONFIG, [batch], save_directory=folder).eval()
    return request.param, made, folder


def renamed(folder, change):
    """Change the names in a rank map, those of members included."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"]
    stored["rank_map"] = {
        change(name): {**entry, **({"members": list(map(change, entry["members"]))} if "members" in entry else {})}
        for name, entry in stored["rank_map"].items()
    }
    path.write_text(json.dumps(config))


def toggled(name):
    """The name that the other line has: with or without what lies around a tower or a detector."""
    for prefix in ("vision_model.encoder.", "model."):
        if name.startswith(prefix):
            return name.removeprefix("vision_model." if prefix.startswith("vision") else prefix)
    return f"vision_model.{name}" if name.startswith("encoder.layers") else f"model.{name}"


def test_a_map_with_the_names_of_another_release(saved, tmp_path):
    name, made, folder = saved
    for each in folder.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    # Each tower of a model of two has its own name in all releases.
    change = (lambda each: f"model.{each}") if name == "CLIP" else toggled
    renamed(tmp_path, change)
    reloaded = type(made).from_pretrained(tmp_path)
    assert compressed_layers(reloaded).keys() == compressed_layers(made).keys()
    state = reloaded.state_dict()
    assert all(torch.equal(state[key], each) for key, each in made.state_dict().items())
    assert reloaded.config.quantization_config.rank_map == made.config.quantization_config.rank_map


def test_names_in_files_are_those_of_the_hub(saved):
    name, _, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    if "tower" in name:
        assert all(key.startswith("vision_model.") for key in keys)
    if name == "RT-DETR":
        assert any(re.match(r"model\.encoder\.encoder\.0\.layers\.0\.fc1\.", key) for key in keys)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))


class Towers(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = Stack(), Stack()


@pytest.mark.parametrize(
    ("root", "found"),
    [("first.layers", "first"), ("model.second.layers", "second"), ("layers", None), ("other.layers", None)],
)
def test_a_stack_that_is_unclear_is_not_guessed(root, found):
    layers = {f"{root}.{block}.{place}": FactoredLayer(1, True) for block in (0, 1) for place in (0, 1)}
    expected = root if found is None else f"{found}.layers"
    assert set(under_present_names(Towers(PretrainedConfig()), layers)) == {
        name.replace(root, expected, 1) for name in layers
    }


class Filled(nn.Module):
    """A model as Transformers 4.57 fills it: a method finds the name that each tensor of a file has in the model."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def state_dict(self):
        return dict.fromkeys(self.names)

    def _get_key_renaming_mapping(self, names):
        return {name: name for name in names}


@pytest.mark.parametrize(
    ("stored", "present", "in_file", "in_model"),
    [
        (
            "encoder.layers",
            "vision_model.encoder.layers",
            "embeddings.patch.weight",
            "vision_model.embeddings.patch.weight",
        ),
        ("encoder.layer", "encoder.layers", "encoder.layer.0.norm.bias", "encoder.layers.0.norm.bias"),
        ("tower.layers", "tower.tower.layers", "model.tower.norm.bias", "model.tower.tower.norm.bias"),
        ("tower.tower.layers", "tower.layers", "model.tower.tower.norm.bias", "model.tower.norm.bias"),
    ],
)
def test_tensors_around_a_stack_of_another_name_are_found(stored, present, in_file, in_model):
    model = Filled(in_model, "head.weight", f"{present}.0.fc1.weight")
    read_renamed(model, [f"{stored}.0.fc1"], [f"{present}.0.fc1"])
    found = model._get_key_renaming_mapping([in_file, "head.weight", "other.weight"])
    assert found == {in_file: in_model, "head.weight": "head.weight", "other.weight": "other.weight"}
    assert model._get_key_renaming_mapping([in_file]) == {in_file: in_file}


def test_stacks_of_one_name_but_for_the_plural():
    layers = {f"first.layer.{block}.{place}": FactoredLayer(1, True) for block in (0, 1) for place in (0, 1)}
    assert all(name.startswith("first.layers.") for name in under_present_names(Towers(PretrainedConfig()), layers))


@pytest.mark.parametrize("name", ["TIPSv2, tower", "Qwen2.5-Omni, thinker"])
def test_prefixes_of_the_hub_that_are_read_as_something_else_are_not_written(name, tmp_path):
    family = FAMILIES[name]
    if not family.exists:
        pytest.skip("This release of Transformers does not have it.")
    batch = family.batches(1, 2)[0]
    made = MixRankCompressor(family.make()).compress(CONFIG, [batch], save_directory=tmp_path)
    reloaded, found = type(made).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    state = reloaded.state_dict()
    assert all(torch.equal(state[key], each) for key, each in made.state_dict().items())


def test_heads_that_a_detector_holds_twice_are_left_out():
    model = FAMILIES["RT-DETR"].make()
    model.held_twice = model.model.decoder.class_embed
    compressor = MixRankCompressor(model)
    batch = FAMILIES["RT-DETR"].batches(1, 2)[0]
    made = compressor.compress(
        settings(metric="second_moment", recipe="fast", structures=["rank"], compensation=[]), [batch]
    )
    names = [layer.name for layer in compressor.report.layers if layer.targeted]
    assert names and not any("class_embed" in name for name in names)
    assert isinstance(made.model.decoder.class_embed[0], nn.Linear)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="Transformers 4.x keeps these names")
def test_a_dense_model_is_saved_as_ever(tmp_path):
    model = FAMILIES["CLIP, tower"].make()
    assert find_targets(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(key.startswith("vision_model.") for key in file.keys())  # noqa: SIM118
