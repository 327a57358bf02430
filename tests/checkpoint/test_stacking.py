"""Layers that some releases of Transformers stack on disk, where only one of them is compressed."""

import copy

import pytest
import torch
import transformers
from checkpoint.mixed import factored_layer, mixed_model
from families.catalogue import FAMILIES
from families.checks import settings
from models import pixels
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint.factorize import (
    changed_layers,
    entry_within,
    insert_layer,
    layer_of,
    rank_map_of,
    share_model,
)
from optimum_mixrank.checkpoint.names import Target, canonical_names
from optimum_mixrank.checkpoint.quantizer import MixRankHfQuantizer, attach
from optimum_mixrank.runtime.distributed import Processes


IS_DIVIDED = int(transformers.__version__.split(".")[0]) >= 5
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def swiglu():
    torch.manual_seed(0)
    return Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=3, use_swiglu_ffn=True, num_labels=5)).eval()


def reloaded(model, path):
    model.save_pretrained(path)
    return AutoModelForImageClassification.from_pretrained(path)


@pytest.mark.skipif(not IS_DIVIDED, reason="one layer in this release of Transformers")
@pytest.mark.parametrize("compressed", [["gate_proj"], ["up_proj"], ["gate_proj", "up_proj"]], ids=str)
def test_one_of_two_stacked_layers_may_be_compressed(compressed, tmp_path):
    model = swiglu()
    targets = [Target(name, key, model.get_submodule(name)) for name, key in canonical_names(model).items()]
    for target in targets:
        if target.name.rpartition(".")[2] in compressed and ".0." in target.name:
            insert_layer(model, target, factored_layer(target.module, "factors"))
    stored = {name: entry.to_dict() for name, entry in rank_map_of(model, targets).items()}
    attach(model, MixRankHfQuantizer(MixRankConfig(rank_map=stored), pre_quantized=True))
    with torch.no_grad():
        expected = model(pixels()).logits
        first = reloaded(model, tmp_path / "first")
        assert torch.equal(first(pixels()).logits, expected)
        assert torch.equal(reloaded(first, tmp_path / "second")(pixels()).logits, expected)
        # Dense again, they are stored as Transformers stores them.
        dense = first.dequantize()
        torch.testing.assert_close(reloaded(dense, tmp_path / "dense")(pixels()).logits, dense(pixels()).logits)
    names = set(load_file(tmp_path / "dense" / "model.safetensors"))
    assert not any("gate_proj" in name or "up_proj" in name for name in names)


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_gates_and_values_of_fewer_units(layout, tmp_path):
    model, _ = mixed_model(layout, model=swiglu(), chunks=1 if IS_DIVIDED else 2)
    with torch.no_grad():
        expected = model(pixels()).logits
        loaded = reloaded(model, tmp_path)
        assert torch.equal(loaded(pixels()).logits, expected)
        dense = loaded.dequantize()
        torch.testing.assert_close(dense(pixels()).logits, expected, rtol=1e-4, atol=1e-4)
    shapes = {name: tensor.shape for name, tensor in swiglu().state_dict().items()}
    assert {name: tensor.shape for name, tensor in dense.state_dict().items()} == shapes


class Other(Processes):
    """A process that gets from the main one what this model holds."""

    def __init__(self, model, targets):
        super().__init__(index=1, count=2)
        self.layers = [layer_of(model, target) for target in changed_layers(model, targets)]
        self.dense = [target.module for target in changed_layers(model, targets)]
        self.values = model.state_dict()

    def broadcast(self, value, source=0):
        return entry_within(self.layers[0], self.dense.pop(0))

    def send(self, tensors, source, device=None):
        return self.layers.pop(0).state_dict() if self.layers else {key: self.values[key] for key in tensors}


def test_all_processes_know_what_is_stacked():
    model, targets = mixed_model(model=swiglu(), chunks=1 if IS_DIVIDED else 2)
    expected = rank_map_of(model, targets)
    other = copy.deepcopy(model)
    share_model(other, targets, Other(model, targets))
    assert rank_map_of(other, targets) == expected
    assert {entry.chunks for entry in expected.values()} == ({1} if IS_DIVIDED else {1, 2})
    with torch.no_grad():
        assert torch.equal(other(pixels()).logits, model(pixels()).logits)


@pytest.mark.skipif(not FAMILIES["RADIO"].exists, reason="This release of Transformers does not have it.")
def test_factors_of_layers_that_are_stacked_under_a_name_without_a_parameter(tmp_path):
    family = FAMILIES["RADIO"]
    config = settings(
        metric="second_moment",
        recipe="fast",
        structures=["rank"],
        compensation=[],
        rank_pattern={"q_proj": 3, "v_proj": 5},
    )
    batch = family.batches(1, 2)[0]
    made = MixRankCompressor(family.make()).compress(config, [batch], save_directory=tmp_path).eval()
    again = type(made).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).features, made(**batch).features)
