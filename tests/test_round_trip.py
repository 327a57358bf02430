"""Save with plain Transformers and reload: the loaded model is the saved one."""

import copy
import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny_deit, tiny_swin, tiny_vit
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)
from transformers.models.auto import auto_factory

from optimum_mixrank import FactoredLinear, MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.checkpoint.rank_map import LAYOUT_NAMES, encode_rows


FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}
CASES = [(family, layout) for family in FAMILIES for layout in LAYOUT_NAMES]


def compress(model, inplace=True, **changes):
    """Compress to mixed ranks, with tall and wide, dense and factored layers."""
    settings = {
        "compression_ratio": 0.3,
        "compression_scope": "targets",
        "recipe": "fast",
        "allocation": "global",
        "rank_pattern": {r"0.*(intermediate\.dense|key)": 5},
        "ratio_pattern": {r"1.*attention\.output\.dense": 0},
        **changes,
    }
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return MixRankCompressor(model).compress(MixRankConfig(**settings), [pixels], inplace=inplace)


def factored(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@functools.cache
def made_once(family, layout):
    return compress(FAMILIES[family](), layout=layout).eval()


@pytest.fixture(params=CASES, ids="-".join)
def model(request):
    return copy.deepcopy(made_once(*request.param))


def logits(model, pixels):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels.to(model.dtype)).logits


def load(folder, **kwargs):
    return type_of(folder).from_pretrained(folder, **kwargs)


def type_of(folder):
    import transformers

    return getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])


def test_the_case_is_mixed(model):
    shapes = {(m.out_features > m.in_features, m.out_features < m.in_features) for m in factored(model).values()}
    assert {(True, False), (False, True), (False, False)} <= shapes
    assert len({module.rank for module in factored(model).values()}) > 1
    assert sum(isinstance(module, nn.Linear) for module in model.base_model.modules()) > 2 * len(factored(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reloaded_logits_are_bit_identical(model, pixels, tmp_path, dtype):
    model = model.to(dtype)
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, dtype=dtype)
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded, pixels), logits(model, pixels))


def test_shards(model, pixels, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path), pixels), logits(model, pixels))


def test_second_save_is_the_same_checkpoint(model, pixels, tmp_path):
    model.save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_only_safetensors_and_json_are_written(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_auto_class_loads_vit(pixels, tmp_path):
    model = compress(tiny_vit())
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, pixels), logits(model, pixels))


def test_opens_as_bare_backbone(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path).eval()
    assert len(factored(bare)) == len(factored(model))
    with torch.no_grad():
        expected = model.base_model(pixel_values=pixels).last_hidden_state
        assert torch.equal(bare(pixel_values=pixels).last_hidden_state, expected)


def test_opens_as_auto_backbone(pixels, tmp_path, monkeypatch):
    # Transformers 5.23 asks the Hub whether the name exists before it looks for a local folder.
    if hasattr(auto_factory, "hf_api"):
        monkeypatch.setattr(auto_factory, "hf_api", lambda: SimpleNamespace(repo_exists=lambda name: True))
    model = compress(tiny_swin())
    model.save_pretrained(tmp_path)
    backbone = AutoBackbone.from_pretrained(str(tmp_path), out_features=["stage1", "stage2"]).eval()
    assert len(factored(backbone)) == len(factored(model))
    dense = AutoBackbone.from_pretrained(
        _save(to_dense(model), str(tmp_path / "dense")), out_features=["stage1", "stage2"]
    )
    with torch.no_grad():
        for maps in zip(backbone(pixels).feature_maps, dense.eval()(pixels).feature_maps, strict=True):
            torch.testing.assert_close(*maps, atol=1e-4, rtol=1e-4)


def _save(model, folder):
    model.save_pretrained(folder)
    return folder


def test_opens_with_a_new_head(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(reloaded, pixels).shape == (3, 7)
    assert _encoder_tensors(reloaded) == _encoder_tensors(model)


def test_headless_into_headed(pixels, tmp_path):
    bare = compress(tiny_vit().vit)
    bare.save_pretrained(tmp_path)
    for auto in (AutoModelForImageClassification, AutoModelForMaskedImageModeling):
        assert _encoder_tensors(auto.from_pretrained(tmp_path)) == _encoder_tensors(bare)


def _encoder_tensors(model):
    return {
        name: tensor.double().sum().item()
        for name, tensor in model.base_model.state_dict().items()
        if "encoder" in name or "layers" in name
    }


def test_disk_offload(model, pixels, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    names = [name for name, _ in model.named_children()]
    device_map = dict.fromkeys(names, "cpu")
    device_map[model.base_model_prefix] = "disk"
    offloaded = load(tmp_path / "checkpoint", device_map=device_map, offload_folder=tmp_path / "offload")
    assert "meta" in {parameter.device.type for parameter in offloaded.parameters()}
    # Pivoted layers in memory reorder rows, offloaded ones reorder outputs, which rounds differently.
    torch.testing.assert_close(logits(offloaded, pixels), logits(model, pixels), rtol=1e-5, atol=1e-5)


def test_in_memory_and_reloaded_models_have_the_same_attributes(model, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    for each in (model, reloaded):
        assert each.is_quantized is False
        assert each.quantization_method == "mixrank"
        assert each.hf_quantizer.is_trainable
        assert not getattr(each.config, "_is_quantized", False)
    assert reloaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("origin", ["in memory", "reloaded"])
def test_casts_copies_and_compiles(pixels, tmp_path, origin):
    model = compress(tiny_vit())
    if origin == "reloaded":
        model.save_pretrained(tmp_path)
        model = load(tmp_path)
    expected = logits(model, pixels)
    assert torch.equal(logits(copy.deepcopy(model), pixels), expected)
    assert copy.deepcopy(model).half().dtype == torch.float16
    assert torch.equal(logits(copy.deepcopy(model).double().float(), pixels), expected)
    assert copy.deepcopy(model).to(torch.bfloat16).dtype == torch.bfloat16
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, pixels), expected)


@pytest.mark.parametrize("origin", ["in memory", "reloaded"])
def test_trainer_trains_factors_and_the_result_reloads(pixels, tmp_path, origin):
    model = compress(tiny_vit())
    if origin == "reloaded":
        model.save_pretrained(tmp_path / "start")
        model = load(tmp_path / "start")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"pixel_values": image, "labels": torch.tensor(i % 2)} for i, image in enumerate(pixels)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    for name in ("factor_a", "factor_b"):
        changed = [key for key in before if name in key and not torch.equal(before[key], model.state_dict()[key])]
        assert changed
    trainer.save_model(str(tmp_path / "end"))
    assert torch.equal(logits(load(tmp_path / "end"), pixels), logits(model, pixels))


def test_dequantize_gives_a_standard_dense_model(model, pixels, tmp_path):
    expected, parameters = logits(model, pixels), model.num_parameters()
    dense = model.dequantize()
    assert not factored(dense)
    assert dense.num_parameters() > parameters
    torch.testing.assert_close(logits(dense, pixels), expected, atol=1e-4, rtol=1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path), pixels), logits(dense, pixels))


def test_to_dense_of_a_reloaded_model(pixels, tmp_path):
    model = compress(tiny_vit())
    model.save_pretrained(tmp_path)
    dense = to_dense(load(tmp_path))
    torch.testing.assert_close(logits(dense, pixels), logits(model, pixels), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="is dense already"):
        to_dense(dense)


WITHOUT_THE_PLUGIN = """
import json, sys, transformers
found = {}
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    try:
        found[folder] = getattr(transformers, name).from_pretrained(folder).num_parameters()
    except Exception as error:
        found[folder] = str(error)
assert "optimum_mixrank" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_the_plugin(tmp_path_factory):
    """What a process without the plugin opens, by family, layout and kind: the number of parameters, or the error."""
    folders = {}
    for case in CASES:
        compressed = copy.deepcopy(made_once(*case))
        for kind, model in (("compressed", compressed), ("dense", to_dense(copy.deepcopy(compressed)))):
            folders[(*case, kind)] = str(tmp_path_factory.mktemp(kind))
            model.save_pretrained(folders[(*case, kind)])
    command = [sys.executable, "-c", WITHOUT_THE_PLUGIN, *folders.values()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    return {key: found[folder] for key, folder in folders.items()}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_without_the_plugin_loading_raises(without_the_plugin, family, layout):
    # As docs/troubleshooting.md quotes them.
    messages = ("You set `ignore_mismatched_sizes` to `False`, thus raising an error.", "size mismatch for weight:")
    assert any(message in without_the_plugin[family, layout, "compressed"] for message in messages)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_dense_model_needs_no_plugin(without_the_plugin, family, layout):
    assert without_the_plugin[family, layout, "dense"] == FAMILIES[family]().num_parameters()


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_compress_while_loading(pixels, tmp_path, recipe):
    tiny_vit().save_pretrained(tmp_path / "original")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "original")
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    config = MixRankConfig(recipe=recipe, compression_ratio=0.3, dataset=str(folder))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "original", quantization_config=config)
    assert factored(model) and not model.is_quantized
    explicit = MixRankCompressor.from_pretrained(tmp_path / "original").compress(config, str(folder))
    assert torch.equal(logits(model, pixels), logits(explicit, pixels))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out"), pixels), logits(model, pixels))


def test_dense_checkpoint_without_images_is_refused_with_advice(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"MixRankCompressor\.from_pretrained"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=MixRankConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1000}, "allows 31 at most"),
        ({"rank": -1}, "not a positive integer"),
        ({"rank": "8"}, "not a positive integer"),
        ({"rank": True}, "not a positive integer"),
        ({"extra": 1}, "must have the keys"),
        ({"bias": 1}, "is neither true nor false"),
    ],
    ids=str,
)
def test_a_damaged_rank_map_is_refused(tmp_path, change, message):
    compress(tiny_vit()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = "encoder.layer.0.attention.attention.key"
    config["quantization_config"]["rank_map"][name].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(("shift", "more"), [(100, 0), (0, 1)], ids=["outside of the layer", "too many"])
def test_wrong_pivots_are_refused(tmp_path, shift, more):
    compress(tiny_vit()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]["rank_map"]["encoder.layer.0.attention.attention.key"]
    entry["pivots"] = encode_rows(range(shift, shift + entry["rank"] + more))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"different rows, ascending; \d+ are given, the last is \(\d+,\)"):
        load(tmp_path)


def test_a_rank_map_of_another_architecture_is_refused(tmp_path):
    compress(tiny_vit()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entries = config["quantization_config"]["rank_map"]
    config["quantization_config"]["rank_map"] = {f"{name}.other": entry for name, entry in entries.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="belongs to another architecture"):
        load(tmp_path)


def test_newer_checkpoints(tmp_path, caplog):
    compress(tiny_vit()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["future_field"] = 1
    path.write_text(json.dumps(config))
    load(tmp_path)
    config["quantization_config"]["layout_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layout_version=99 is unknown"):
        load(tmp_path)


def test_reduction_of_swin_gets_no_bias(tmp_path):
    model = compress(tiny_swin())
    entries = model.config.quantization_config.factored_layers
    reductions = {name: entry for name, entry in entries.items() if name.endswith("reduction")}
    assert reductions
    assert not any(entry.bias for entry in reductions.values())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(name.endswith("reduction.factor_b.bias") for name in file.keys())  # noqa: SIM118
