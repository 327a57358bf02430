"""A damaged checkpoint gives an error that names the layer, or the model that was saved, and never another one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification

from optimum_mixrank.checkpoint import completeness
from optimum_mixrank.checkpoint.loading import insert_factored_layers
from optimum_mixrank.checkpoint.rank_map import FactoredLayer


GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = load_file(GOLDEN / "expected.safetensors") | load_file(GOLDEN / "mixed/expected.safetensors")
LAYER = "encoder.layer.0.attention.attention.key"
FACTOR = f"vit.{LAYER}.factor_a.weight"
MIXED = ["mixed/vit/factors", "mixed/swin/pivoted"]
CHECKPOINTS = ["vit/factors", "vit/pivoted", "swin/pivoted", *MIXED]


def damaged(folder, name, change=lambda tensors, rank_map, config: None):
    """Copy a golden checkpoint, changed."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    tensors = load_file(GOLDEN / name / "model.safetensors")
    change(tensors, config["quantization_config"]["rank_map"], config)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, **kwargs).eval()


def assert_same(model, name):
    with torch.no_grad():
        logits = model(pixel_values=EXPECTED["pixel_values"]).logits
    torch.testing.assert_close(logits, EXPECTED[name], rtol=0, atol=1e-5 * EXPECTED[name].abs().max().item())


def drop_factor(tensors, rank_map, config):
    del tensors[FACTOR]


def drop_layer(tensors, rank_map, config):
    for key in [key for key in tensors if f".{LAYER}." in key]:
        del tensors[key]


def misspell_factor(tensors, rank_map, config):
    tensors[FACTOR.replace("factor_a", "factor_c")] = tensors.pop(FACTOR)


def misspell_layer(tensors, rank_map, config):
    for key in [key for key in tensors if f".{LAYER}." in key]:
        tensors[key.replace(".key.", ".kye.")] = tensors.pop(key)


def misspell_entry(tensors, rank_map, config):
    rank_map[f"{LAYER}s"] = rank_map.pop(LAYER)


def drop_entry(tensors, rank_map, config):
    del rank_map[LAYER]


def integers(tensors, rank_map, config):
    tensors[FACTOR] = tensors[FACTOR].to(torch.int32)


def booleans(tensors, rank_map, config):
    tensors[FACTOR] = tensors[FACTOR] > 0


def cut(tensors, rank_map, config):
    tensors[FACTOR] = tensors[FACTOR][:, :-1].contiguous()


def higher_rank(tensors, rank_map, config):
    rank_map[LAYER]["rank"] += 1
    rank_map[LAYER].pop("pivots", None)
    rank_map[LAYER]["layout"] = "factors"


def other_bias(tensors, rank_map, config):
    rank_map[LAYER]["bias"] = False


def no_bias_at_all(tensors, rank_map, config):
    config["qkv_bias"] = rank_map[LAYER]["bias"] = False
    for name in ("query", "value"):
        for block in (0, 1):
            rank_map.get(LAYER.replace("0", str(block)).replace("key", name), {})["bias"] = False


def dense_weight(tensors, rank_map, config):
    tensors[f"vit.{LAYER}.weight"] = torch.ones(16, 16)


@pytest.mark.parametrize(
    "change",
    [
        *(drop_factor, drop_layer, misspell_factor, misspell_layer, misspell_entry, drop_entry, integers, booleans),
        *(cut, higher_rank, other_bias, no_bias_at_all),
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("name", ["vit/factors", "vit/pivoted"])
@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore_mismatched_sizes"])
def test_a_damaged_checkpoint_is_refused(name, change, ignore, tmp_path):
    folder = damaged(tmp_path, name, change)
    with pytest.raises(ValueError, match=LAYER if change is not no_bias_at_all else "bias"):
        load(folder, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("name", ["vit/factors", "vit/pivoted"])
def test_a_dense_weight_beside_the_factors_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{LAYER}' is stored as a dense layer, but is in the rank map"):
        load(damaged(tmp_path, name, dense_weight))


JOINT = "encoder.layer.0.attention.attention.query.joint"
NARROW = "encoder.layer.0.intermediate.dense"


def change_tensor(key, change):
    def apply(tensors, rank_map, config):
        tensors[f"vit.{key}"] = change(tensors[f"vit.{key}"]).contiguous()

    return apply


def move(name, new):
    def apply(tensors, rank_map, config):
        for key in [key for key in tensors if f".{name}." in key]:
            tensors[key.replace(name, new)] = tensors.pop(key)

    return apply


def change_map(name, **changes):
    def apply(tensors, rank_map, config):
        for entry in (rank_map[name], *(rank_map[each] for each in rank_map[name].get("members", []))):
            entry.update(changes)

    return apply


def whole_mlp_lost(tensors, rank_map, config):
    for part in ("intermediate", "output"):
        del rank_map[f"encoder.layer.0.{part}.dense"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, *_: tensors.pop(f"vit.{JOINT}.factor_a.weight"), f"lacks .*factor_a.weight of '{JOINT}'"),
        (move(JOINT, JOINT.replace("joint", "other")), f"lacks .*'{JOINT}'"),
        (move(JOINT, JOINT.removesuffix(".joint")), "The checkpoint holds factor_.* which shares its factors"),
        (move(JOINT, JOINT.replace("query", "key")), f"lacks .*'{JOINT}'"),
        (
            change_tensor(f"{JOINT}.factor_b.weight", lambda each: each[1:]),
            f"factor_b.weight .*'{JOINT}' is stored with",
        ),
        (change_tensor(f"{JOINT}.factor_a.weight", torch.Tensor.int), f"'{JOINT}' is stored as"),
        (change_map(LAYER, rank=4), f"'{JOINT}' is stored with shape"),
        (change_map(LAYER, bias=False), "bias"),
        (change_map(LAYER, rank=999), "has rank 999"),
        (lambda tensors, rank_map, _: rank_map.pop(LAYER), "shares its first factor with .*does not agree"),
        (lambda tensors, *_: tensors.pop(f"vit.{NARROW}.weight"), f"lacks .*weight of '{NARROW}'"),
        (change_tensor(f"{NARROW}.weight", lambda each: each[1:]), f"weight .*'{NARROW}' is stored with shape"),
        (change_tensor(f"{NARROW}.bias", lambda each: each[1:]), f"bias .*'{NARROW}' is stored with shape"),
        (change_tensor(f"{NARROW}.weight", torch.Tensor.int), f"'{NARROW}' is stored as"),
        (change_tensor(f"{NARROW}.weight", lambda each: each[:0, 0]), f"'{NARROW}' is stored"),
        (change_map(NARROW, shape=[20, 16]), f"'{NARROW}' is stored with shape"),
        (change_map(NARROW, dense_shape=[40, 16]), f"'{NARROW}' was made for a layer of shape"),
        (change_map(NARROW, shape=[33, 16], dense_shape=[34, 16]), f"'{NARROW}' was made for a layer of shape"),
        (lambda tensors, rank_map, config: config.update(intermediate_size=48), "was made for a layer of shape"),
    ],
)
@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore_mismatched_sizes"])
def test_damaged_layers_of_mixed_structure_are_refused(change, message, ignore, tmp_path):
    # Transformers 4.57 takes tensors of another size for missing ones if it is to ignore them.
    ignored = f"{message}|do not fit: .*'({JOINT}|{NARROW})'"
    with pytest.raises(ValueError, match=ignored if ignore else message):
        load(damaged(tmp_path, "mixed/vit/factors", change), ignore_mismatched_sizes=ignore)


def test_narrow_layers_without_their_entries_are_refused(tmp_path):
    with pytest.raises((RuntimeError, ValueError), match="mismatch|size"):
        load(damaged(tmp_path, "mixed/vit/factors", whole_mlp_lost))


@pytest.mark.parametrize("name", MIXED)
def test_shards_of_mixed_structure(name, tmp_path):
    load(GOLDEN / name).save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert_same(load(tmp_path), name)


def test_missing_pivots_are_refused(tmp_path):
    folder = damaged(tmp_path, "vit/pivoted", lambda tensors, rank_map, config: rank_map[LAYER].pop("pivots"))
    with pytest.raises(ValueError, match=f"'{LAYER}' names no pivots"):
        load(folder)


def test_shards_are_read_together(tmp_path):
    load(GOLDEN / "vit/factors").save_pretrained(tmp_path, max_shard_size="4KB")
    assert_same(load(tmp_path), "vit/factors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = tmp_path / content["weight_map"][FACTOR]
    tensors = load_file(shard)
    del tensors[FACTOR], content["weight_map"][FACTOR]
    save_file(tensors or {"other": torch.ones(1)}, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lacks tensors .* factor_a.weight of '{LAYER}'"):
        load(tmp_path)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_empty_weight_may_be_missing(name, tmp_path):
    def drop(tensors, rank_map, config):
        for key in [key for key, tensor in tensors.items() if not tensor.numel()]:
            del tensors[key]

    assert_same(load(damaged(tmp_path, name, drop)), name)


def test_a_state_dict_in_memory():
    config = AutoConfig.from_pretrained(GOLDEN / "vit/pivoted")
    state = load_file(GOLDEN / "vit/pivoted" / "model.safetensors")
    model = ViTForImageClassification.from_pretrained(None, config=config, state_dict=dict(state)).eval()
    assert_same(model, "vit/pivoted")
    del state[FACTOR]
    with pytest.raises(ValueError, match=f"lacks tensors .*'{LAYER}'"):
        ViTForImageClassification.from_pretrained(None, config=config, state_dict=state)


def test_a_dense_model_made_from_the_configuration(tmp_path):
    model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(GOLDEN / "vit/pivoted"))
    model.save_pretrained(tmp_path)
    # As it is saved where nothing else of this library is used.
    shutil.copy(GOLDEN / "vit/pivoted/config.json", tmp_path)
    with pytest.raises(ValueError, match="encoder.layer.0"):
        load(tmp_path)


def test_a_release_that_does_not_ask_is_noticed(tmp_path):
    model = tiny_vit()
    insert_factored_layers(model, {LAYER: FactoredLayer(3, True)})
    completeness.refuse_missing_factors(model)
    with pytest.raises(
        RuntimeError, match="loads weights in a way that this version of optimum-mixrank does not know"
    ):
        completeness.check_filled(model)


def entry_keys(name):
    return sorted(json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]["rank_map"])


DAMAGES = {
    "drop": lambda tensors, key: tensors.pop(key),
    "misspell": lambda tensors, key: tensors.update({f"{key}x": tensors.pop(key)}),
    "swap case": lambda tensors, key: tensors.update({key.swapcase(): tensors.pop(key)}),
    "int8": lambda tensors, key: tensors.update({key: tensors[key].to(torch.int8)}),
    "flat": lambda tensors, key: tensors.update({key: tensors[key].flatten()}),
    "longer": lambda tensors, key: tensors.update({key: torch.cat([tensors[key]] * 2)}),
    "empty": lambda tensors, key: tensors.update({key: tensors[key][:0].clone()}),
    "float64": lambda tensors, key: tensors.update({key: tensors[key].double()}),
    "nothing": lambda tensors, key: None,
}


@given(name=st.sampled_from(CHECKPOINTS), kind=st.sampled_from(sorted(DAMAGES)), choice=st.integers(0, 10_000))
def test_stored_tensors(tmp_path_factory, name, kind, choice):
    folder = tmp_path_factory.mktemp("damaged")
    layers = entry_keys(name)
    hit = None

    def change(tensors, rank_map, config):
        nonlocal hit
        keys = sorted(
            key for key, tensor in tensors.items() if tensor.numel() and any(f".{layer}." in key for layer in layers)
        )
        hit = keys[choice % len(keys)]
        DAMAGES[kind](tensors, hit)

    damaged(folder, name, change)
    try:
        model = load(folder)
    except ValueError as error:
        assert kind not in ("nothing", "float64")
        assert any(layer in str(error) for layer in layers if f".{layer}." in hit), str(error)
    else:
        assert_same(model, name)
    finally:
        shutil.rmtree(folder)


@given(
    name=st.sampled_from(CHECKPOINTS),
    choice=st.integers(0, 100),
    field=st.sampled_from(["rank", "bias", "layout", "pivots", "members", "shape", "dense_shape", "chunks", "other"]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 40),
        st.sampled_from(
            [10**30, "factors", "pivoted", "ff", "0", "f" * 5000, "\x1b[31m" * 1000, [1], {"a": 1}, 0.5, [5, 16]]
        ),
        st.text(max_size=5),
    ),
)
def test_rank_maps(tmp_path_factory, name, choice, field, value):
    folder = tmp_path_factory.mktemp("damaged")

    def change(tensors, rank_map, config):
        entry = rank_map[sorted(rank_map)[choice % len(rank_map)]]
        stored.update(entry)
        entry[field] = value

    stored = {}
    damaged(folder, name, change)
    try:
        model = load(folder)
    except ValueError as error:
        assert len(str(error)) < 1000 and "\x1b" not in str(error)
        assert any(each in str(error) for each in ("rank_map entry", "rank map", "pivots", "shares"))
    else:
        # Other rows of the same number are another checkpoint, which is as good as this one.
        if field != "pivots":
            assert_same(model, name)
    finally:
        shutil.rmtree(folder)
