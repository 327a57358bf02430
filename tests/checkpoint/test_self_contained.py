"""Checkpoints that bring their code open where this package does not exist, and as before where it does."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import compressed, mixed, pixels, tiny_deit, tiny_swin, tiny_swinv2, tiny_vit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTForImageClassification,
    ViTModel,
)

import optimum_mixrank
from optimum_mixrank import FactoredLinear, MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.checkpoint.architecture import load_named
from optimum_mixrank.checkpoint.entries import compressed_layers


PACKAGE = Path(optimum_mixrank.__file__).parent
SETTINGS = {"compression_ratio": 0.3, "compression_scope": "targets", "recipe": "fast"}

# Opens each folder, saves it again, opens that, and keeps what the two compute.
ELSEWHERE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

class Nothing:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "optimum_mixrank":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import torch, transformers
from safetensors.torch import load_file, save_file

transformers.logging.disable_progress_bar()
# Transformers 5.23 asks the Hub whether the name of a backbone exists before it looks for a local folder.
transformers.models.auto.auto_factory.hf_api = lambda: SimpleNamespace(repo_exists=lambda name: True)
found = {}

def opened(folder):
    auto_class = getattr(transformers, json.loads((folder / "opening.json").read_text()))
    model, info = auto_class.from_pretrained(str(folder), trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        output = model.eval()(**load_file(folder / "inputs.safetensors"))
    values = output.feature_maps[-1] if "feature_maps" in output else output[0]
    lacking = [name for name in info["missing_keys"] if not name.endswith("relative_position_index")]
    return model, values, [*lacking, *info["unexpected_keys"]]

for folder in map(Path, sys.argv[1:]):
    model, first, wrong = opened(folder)
    again = folder / "again"
    model.save_pretrained(again)
    for name in ("opening.json", "inputs.safetensors"):
        (again / name).write_bytes((folder / name).read_bytes())
    _, second, wrong_again = opened(again)
    save_file({"first": first.contiguous(), "second": second.contiguous()}, folder / "outputs.safetensors")
    found[folder.name] = {"class": type(model).__module__, "wrong": wrong + wrong_again}
assert "optimum_mixrank" not in sys.modules
print("WITHOUT TRUST", file=sys.stderr)
for folder in map(Path, sys.argv[1:]):
    try:
        getattr(transformers, json.loads((folder / "opening.json").read_text())).from_pretrained(str(folder))
    except RuntimeError as error:
        found[folder.name]["without trust"] = str(error)
print(json.dumps(found))
"""


def dinov2(cls):
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    extra = {"out_features": ["stage2"]} if cls is Dinov2Backbone else {"num_labels": 5}
    return cls(Dinov2Config(**sizes, mlp_ratio=3, use_swiglu_ffn=cls is not Dinov2Backbone, **extra)).eval()


def clip_tower():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()


def encoder_decoder():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "is_decoder": True, "add_cross_attention": True}
    tokens = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    decoder = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
    encoder = compressed(tiny_vit(ViTModel), "pivoted")
    return transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()


def opens_captions():
    names = ("AutoModelForImageTextToText", "AutoModelForVision2Seq")
    return next(name for name in names if hasattr(transformers, name))


CASES = {
    "vit": (lambda: mixed(tiny_vit(), "pivoted"), "AutoModelForImageClassification"),
    "vit-encoder": (lambda: mixed(tiny_vit(ViTModel)), "AutoModel"),
    "deit": (lambda: compressed(tiny_deit(), "factors"), "AutoModelForImageClassification"),
    "swin": (lambda: mixed(tiny_swin(), "pivoted"), "AutoModelForImageClassification"),
    "swinv2": (lambda: compressed(tiny_swinv2(), "pivoted"), "AutoModelForImageClassification"),
    "dinov2": (lambda: compressed(dinov2(Dinov2ForImageClassification), "pivoted"), "AutoModelForImageClassification"),
    "dinov2-backbone": (lambda: compressed(dinov2(Dinov2Backbone), "factors"), "AutoBackbone"),
    "clip": (lambda: compressed(clip_tower(), "pivoted", ratio_pattern={}), "AutoModel"),
    "captions": (encoder_decoder, opens_captions()),
}


def values_of(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.feature_maps[-1] if "feature_maps" in output else output[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("self-contained")
    for name, (make, opening) in CASES.items():
        make().save_pretrained(root / name, self_contained=True)
        inputs = {"pixel_values": pixels(2)}
        if name == "captions":
            inputs["decoder_input_ids"] = torch.arange(5).repeat(2, 1)
        save_file(inputs, root / name / "inputs.safetensors")
        (root / name / "opening.json").write_text(json.dumps(opening))
    return root


@pytest.fixture(scope="module")
def elsewhere(checkpoints, tmp_path_factory):
    """What a process computes that cannot import the package."""
    folders = [str(checkpoints / name) for name in CASES]
    modules = tmp_path_factory.mktemp("modules")
    code = f"import os; os.environ['HF_MODULES_CACHE'] = {str(modules)!r}\n{ELSEWHERE}"
    result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, cwd=modules)
    assert result.returncode == 0, result.stderr
    # A user who follows this warning would delete the rank map.
    assert "Unknown quantization type" not in result.stderr.partition("WITHOUT TRUST")[0]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path_factory):
    """Code of checkpoints is copied to a folder of its own, and backbones are local folders; see `ELSEWHERE`."""
    hub = SimpleNamespace(repo_exists=lambda name: True)
    monkeypatch.setattr(transformers.models.auto.auto_factory, "hf_api", lambda: hub, raising=False)
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", CASES)
def test_without_the_package_it_computes_the_same(name, checkpoints, elsewhere):
    here = getattr(transformers, CASES[name][1]).from_pretrained(str(checkpoints / name))
    assert compressed_layers(here)
    expected = values_of(here, load_file(checkpoints / name / "inputs.safetensors"))
    outputs = load_file(checkpoints / name / "outputs.safetensors")
    assert torch.equal(outputs["first"], expected)
    assert torch.equal(outputs["second"], expected)
    assert elsewhere[name]["class"].startswith("transformers_modules.")
    assert elsewhere[name]["class"].endswith(".modeling_mixrank")
    assert not elsewhere[name]["wrong"]


def test_what_was_saved_without_the_package_is_the_same_checkpoint(checkpoints, elsewhere):
    for name in CASES:
        folder, again = checkpoints / name, checkpoints / name / "again"
        assert (again / "modeling_mixrank.py").read_text() == (folder / "modeling_mixrank.py").read_text()
        before, after = (json.loads((each / "config.json").read_text()) for each in (folder, again))
        for key in ("auto_map", "architectures", "quantization_config"):
            assert after[key] == before[key], (name, key)
        assert "mixrank" not in after
        tensors, stored = (load_file(each / "model.safetensors") for each in (folder, again))
        assert tensors.keys() == stored.keys()
        assert all(torch.equal(stored[key], tensor) for key, tensor in tensors.items())


def test_without_package_and_trust_loading_stops(elsewhere):
    for name in CASES:
        assert "mismatch" in elsewhere[name]["without trust"], name


def test_with_the_package_and_trust_its_own_code_is_used(checkpoints, tmp_path):
    folder, inputs = checkpoints / "vit", {"pixel_values": pixels()}
    own = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    plugin = AutoModelForImageClassification.from_pretrained(folder)
    assert own.is_self_contained and not any(isinstance(each, FactoredLinear) for each in own.modules())
    assert type(plugin) is ViTForImageClassification
    assert torch.equal(values_of(own, inputs), values_of(plugin, inputs))
    assert not hasattr(own, "hf_quantizer")
    own.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert compressed_layers(reloaded).keys() == compressed_layers(plugin).keys()
    assert torch.equal(values_of(reloaded, inputs), values_of(plugin, inputs))
    with pytest.raises(ValueError, match="was opened with the code in its checkpoint.*without `trust_remote_code`"):
        to_dense(own)


def test_commands_that_trust_code_use_the_package_all_the_same(checkpoints):
    config = transformers.AutoConfig.from_pretrained(checkpoints / "vit")
    model = load_named(checkpoints / "vit", config, None, trust_remote_code=True)
    assert type(model) is ViTForImageClassification and compressed_layers(model)


def test_other_classes_and_heads(checkpoints):
    encoder, info = AutoModel.from_pretrained(
        checkpoints / "vit", trust_remote_code=True, output_loading_info=True, add_pooling_layer=False
    )
    assert encoder.is_self_contained and not info["missing_keys"]
    head = {"num_labels": 7, "ignore_mismatched_sizes": True}
    model = AutoModelForImageClassification.from_pretrained(checkpoints / "vit", trust_remote_code=True, **head)
    assert values_of(model, {"pixel_values": pixels()}).shape == (4, 7)
    # Without AutoModel…, as programs do that load a model a second time.
    again = type(model).from_pretrained(checkpoints / "vit", num_labels=5)
    expected = AutoModelForImageClassification.from_pretrained(checkpoints / "vit")
    assert torch.equal(values_of(again, {"pixel_values": pixels()}), values_of(expected, {"pixel_values": pixels()}))


def test_a_model_without_weights_is_filled_at_random(checkpoints):
    opened = AutoModelForImageClassification.from_pretrained(checkpoints / "vit", trust_remote_code=True)
    model = AutoModelForImageClassification.from_config(opened.config, trust_remote_code=True)
    assert {name: each.shape for name, each in model.state_dict().items()} == {
        name: each.shape for name, each in opened.state_dict().items()
    }
    assert values_of(model, {"pixel_values": pixels()}).isfinite().all()


@pytest.mark.parametrize("damage", ["factor", "rank map", "version"])
def test_a_damaged_checkpoint_is_refused(damage, checkpoints, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(checkpoints / "vit")
    model.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    if damage == "factor":
        name = next(name for name in tensors if name.endswith("factor_a.weight"))
        save_file(
            {key: each for key, each in tensors.items() if key != name},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        message = "lacks tensors of factored layers"
    elif damage == "rank map":
        del config["quantization_config"]
        message = "holds no `quantization_config` with a rank map"
    else:
        config["quantization_config"]["layout_version"] = 99
        message = "layout_version=99 is unknown"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)


def test_the_plugin_keeps_a_checkpoint_self_contained(checkpoints, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(checkpoints / "vit")
    entries = dict(model.config.auto_map)
    model.save_pretrained(tmp_path / "kept")
    assert (tmp_path / "kept" / "modeling_mixrank.py").exists()
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["auto_map"] == entries
    model.save_pretrained(tmp_path / "dropped", self_contained=False)
    assert not (tmp_path / "dropped" / "modeling_mixrank.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "dropped" / "config.json").read_text())
    assert model.config.auto_map == entries
    dense = to_dense(model)
    dense.save_pretrained(tmp_path / "dense")
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / "modeling_mixrank.py").exists()


def test_from_the_hub_the_new_checkpoint_has_its_own_code(checkpoints, tmp_path):
    # Transformers puts the name of the repository before each entry of a checkpoint from the Hub.
    model = AutoModelForImageClassification.from_pretrained(checkpoints / "vit")
    model.config.auto_map = {
        **{name: f"user/repo--{each}" for name, each in model.config.auto_map.items()},
        "AutoImageProcessor": "theirs.Processor",
    }
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert stored.pop("AutoImageProcessor") == "theirs.Processor"
    assert all(each.startswith("modeling_mixrank.") for each in stored.values())


def test_the_compressor_saves_it_and_replaces_it(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    model = compressor.compress(MixRankConfig(**SETTINGS), [pixels(16)])
    compressor.save_pretrained(model, tmp_path / "out", self_contained=True)
    assert (tmp_path / "out" / "modeling_mixrank.py").exists()
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert not hasattr(model.config, "auto_map")
    compressor.save_pretrained(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "modeling_mixrank.py").exists()
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_self_contained_is_refused(tmp_path):
    class Own(ViTForImageClassification):
        pass

    model = compressed(tiny_vit(Own), "factors")
    with pytest.raises(ValueError, match="Own is not a class of Transformers"):
        model.save_pretrained(tmp_path / "out", self_contained=True)
    model = compressed(tiny_vit(), "factors")
    with pytest.raises(ValueError, match="push_to_hub=True would upload a self-contained checkpoint without its code"):
        model.save_pretrained(tmp_path / "out", self_contained=True, push_to_hub=True)
    with pytest.raises(ValueError, match="holds no factored layer and needs no code"):
        tiny_vit().save_pretrained(tmp_path / "out", self_contained=True)
    assert not (tmp_path / "out").exists()


def test_the_file_holds_code_of_the_package_and_nothing_else(checkpoints):
    text = (checkpoints / "vit" / "modeling_mixrank.py").read_text()
    tree = ast.parse(text)
    imported = {
        node.module.split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {*sys.stdlib_module_names, "torch", "transformers"}
    package = "\n".join(each.read_text() for each in (PACKAGE / "checkpoint").glob("*.py"))
    package += "\n".join(each.read_text() for each in (PACKAGE / "runtime").glob("*.py"))
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    foreign = [node.name for node in definitions if ast.get_source_segment(text, node) not in package]
    assert foreign == ["ViTForImageClassification"]


def test_trained_and_cast_like_any_other(checkpoints):
    model = AutoModelForImageClassification.from_pretrained(
        checkpoints / "vit", trust_remote_code=True, dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16 and values_of(model, {"pixel_values": pixels().bfloat16()}).isfinite().all()
    model.float().train()
    model(pixels(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    factors = [each for name, each in model.named_parameters() if "factor_" in name]
    assert factors and all(each.grad is not None for each in factors)
    assert not any(isinstance(each, FactoredLinear) for each in model.modules())
