"""What is checked when empty layers are inserted for shared and narrow ones."""

import json

import pytest
import torch
from checkpoint.mixed import mixed_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import pixels, tiny_vit
from mutations import JSON_VALUES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from optimum_mixrank.checkpoint.entries import compressed_layers
from optimum_mixrank.checkpoint.loading import insert_factored_layers


LAYOUTS = pytest.mark.parametrize("layout", ["factors", "pivoted"])
QUERY = "encoder.layer.0.attention.attention.query"
KEY = "encoder.layer.0.attention.attention.key"
MLP = "encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    model, _ = mixed_model("pivoted", factored=False)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(pixels()).logits


def changed(saved, tmp_path, change):
    """Copy a checkpoint with a changed rank map."""
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["rank_map"], config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@LAYOUTS
@pytest.mark.parametrize("factored", [False, True])
def test_a_model_reloads_with_the_same_bits(layout, factored, tmp_path):
    model, _ = mixed_model(layout, factored)
    with torch.no_grad():
        expected = model(pixels()).logits
        for name in ("first", "second"):
            model.save_pretrained(tmp_path / name, max_shard_size="20KB")
            model = AutoModelForImageClassification.from_pretrained(tmp_path / name)
            assert torch.equal(model(pixels()).logits, expected)
    maps = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("first", "second")
    ]
    assert maps[0] == maps[1]
    assert maps[0]["layout_version"] == 2


@LAYOUTS
def test_layers_that_a_class_freezes_are_frozen_again(layout):
    """As those of the towers in Idefics; Transformers 5 itself makes what it reads trainable."""
    model, _ = mixed_model(layout)
    dense = tiny_vit().requires_grad_(False)
    assert insert_factored_layers(dense, model.hf_quantizer.quantization_config.factored_layers)
    assert not any(parameter.requires_grad for parameter in dense.parameters())


def test_opened_as_base_model_or_with_fewer_blocks(saved):
    folder, _ = saved
    base = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert len(compressed_layers(base)) == 10
    fewer = AutoModelForImageClassification.from_pretrained(folder, num_hidden_layers=1)
    assert len(compressed_layers(fewer)) == 5


def delete(*names):
    def change(rank_map, config):
        for name in names:
            del rank_map[name]

    return change


def put(name, field, value):
    def change(rank_map, config):
        rank_map[name][field] = value

    return change


def rename(rank_map, config):
    rank_map["encoder.layer.1.intermediate.gate"] = rank_map.pop(MLP)


def rewire(rank_map, config):
    members = [QUERY, MLP]
    rank_map[MLP] = {**rank_map[QUERY], "members": members}
    del rank_map[MLP]["pivots"]
    rank_map[QUERY]["members"] = members
    del rank_map[KEY], rank_map[KEY.replace("key", "value")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete(KEY), "whose entry does not agree"),
        (delete(MLP), "size mismatch|mismatched"),
        (
            put(MLP, "shape", [39, 32]),
            r"is stored with shape \[40(, 32)?\]; by the rank map it has shape \[39(, 32)?\]",
        ),
        (put(MLP, "dense_shape", [65, 32]), r"was made for a layer of shape \[65, 32\], but this one has \[64, 32\]"),
        (put(MLP, "bias", False), "has bias=False, but the layer has a bias"),
        (put(QUERY, "pivots", "1"), "pivots"),
        (rename, "has the other layers of|names a|does not exist|size mismatch"),
        (rewire, "is stored|pivots|rank map|lacks"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(saved, tmp_path, change, message):
    path = changed(saved, tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForImageClassification.from_pretrained(path)


FIELDS = ["rank", "bias", "layout", "pivots", "members", "shape", "dense_shape", "chunks", "new"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 9),
    field=st.sampled_from(FIELDS),
    value=JSON_VALUES
    | st.lists(st.integers(1, 96), min_size=2, max_size=2)
    | st.sampled_from([[QUERY, KEY], 1, 8, "f"]),
)
def test_a_damaged_entry_never_gives_other_outputs(saved, tmp_path, position, field, value):
    def change(rank_map, config):
        rank_map[sorted(rank_map)[position]][field] = value

    path = changed(saved, tmp_path, change)
    try:
        model = AutoModelForImageClassification.from_pretrained(path)
    except (ValueError, RuntimeError):
        return
    with torch.no_grad():
        assert torch.equal(model(pixels()).logits, saved[1])


@pytest.mark.parametrize("change", ["missing factor", "missing narrow", "shape", "foreign factor"])
def test_files_that_do_not_fit_are_refused(saved, tmp_path, change):
    path = changed(saved, tmp_path, lambda rank_map, config: None)
    tensors = load_file(path / "model.safetensors")
    joint = next(name for name in tensors if name.endswith("joint.factor_b.weight"))
    narrow = f"vit.{MLP}.weight"
    if change == "missing factor":
        del tensors[joint]
    elif change == "missing narrow":
        del tensors[narrow]
    elif change == "shape":
        tensors[narrow] = torch.zeros(64, 32)
    else:
        tensors[joint.replace("query.joint", "key")] = torch.zeros(88, 8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    message = {"shape": r"shape \[64, 32\]|size mismatch", "foreign factor": "shares its factors"}
    with pytest.raises((ValueError, RuntimeError), match=message.get(change, "lacks tensors of factored layers")):
        AutoModelForImageClassification.from_pretrained(path)
