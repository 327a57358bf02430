"""Canonical names are those of checkpoints, whatever class opens them."""

import sys

import pytest
import torch
import transformers
from models import tiny_deit, tiny_swin, tiny_vit
from safetensors import safe_open
from torch import nn

from optimum_mixrank import LowRankLinear
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.checkpoint.names import Target, canonical_names


MASKED = {"encoder_stride": 8}
MODELS = {
    "ViTForImageClassification": (tiny_vit, {}),
    "ViTModel": (tiny_vit, {}),
    "ViTForMaskedImageModeling": (tiny_vit, MASKED),
    "DeiTForImageClassification": (tiny_deit, {}),
    "DeiTForImageClassificationWithTeacher": (tiny_deit, {}),
    "DeiTModel": (tiny_deit, {}),
    "DeiTForMaskedImageModeling": (tiny_deit, MASKED),
    "SwinForImageClassification": (tiny_swin, {}),
    "SwinModel": (tiny_swin, {}),
    "SwinForMaskedImageModeling": (tiny_swin, MASKED),
    "SwinBackbone": (tiny_swin, {"out_features": ["stage1", "stage2"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_canonical_names_are_those_on_disk(name, tmp_path):
    make, changes = MODELS[name]
    model = make(getattr(transformers, name), **changes)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {key.removeprefix(f"{model.base_model_prefix}.") for key in file.keys()}  # noqa: SIM118
    names = canonical_names(model)
    assert {f"{each}.weight" for each in names.values()} <= on_disk
    assert len(set(names.values())) == len(names)


def test_the_sizes_of_a_layer_are_integers_whatever_it_was_made_with():
    """As in Inkling, which plans its sizes with tensors."""
    layer = nn.Linear(torch.tensor(4), torch.tensor(6))
    shape = Target("layer", "layer", layer).shape
    assert shape == (6, 4) and all(type(each) is int for each in shape)


@pytest.mark.parametrize("make", [tiny_vit, tiny_deit, tiny_swin])
def test_factored_layers_keep_their_canonical_names(make):
    model = make()
    before = canonical_names(model)
    for target in encoder_linears(model):
        replace_module(model, target.name, LowRankLinear(*reversed(target.shape), 3))
    after = {name: each for name, each in canonical_names(model).items() if "factor" not in name}
    assert after == before


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="Transformers 4.x renames nothing")
@pytest.mark.parametrize("module", ["conversion_mapping", "core_model_loading"])
def test_tables_that_have_moved_are_an_error(module, monkeypatch):
    monkeypatch.setitem(sys.modules, f"transformers.{module}", None)
    with pytest.raises(RuntimeError, match="renames parameters in a way that this version of .* does not know"):
        canonical_names(tiny_vit())
