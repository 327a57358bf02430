"""A compressed model becomes a dense one of the original's shapes, or one with narrow MLPs."""

import copy

import pytest
import torch
from models import compressed, mixed, pixels, tiny_deit, tiny_swin, tiny_swinv2, tiny_vit
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from optimum_mixrank import to_dense
from optimum_mixrank.checkpoint.entries import compressed_layers, entry_of
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.checkpoint.names import canonical_names
from optimum_mixrank.checkpoint.narrowing import mark_narrow, selected_columns, selected_rows
from optimum_mixrank.checkpoint.plain import make_plain
from optimum_mixrank.checkpoint.rank_map import DENSE


FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin, "swinv2": tiny_swinv2}


@pytest.fixture(params=FAMILIES)
def build(request):
    return FAMILIES[request.param]


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels()).logits


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_the_shapes_of_the_original_and_the_same_function(build, layout, tmp_path):
    model = mixed(build(), layout)
    expected = logits(model)
    dense = to_dense(model)
    assert dense is model and not compressed_layers(dense) and shapes(dense) == shapes(build())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    assert torch.equal(logits(load(tmp_path)), logits(dense))


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_widths_are_kept_and_a_plain_configuration_describes_them(build, layout, tmp_path):
    model = mixed(build(), layout)
    expected, original = logits(model), build().num_parameters()
    narrow = to_dense(model, keep_widths=True)
    # All blocks have lost the same share.
    assert not compressed_layers(narrow)
    assert narrow.num_parameters() < original
    torch.testing.assert_close(logits(narrow), expected, rtol=1e-4, atol=1e-4)
    narrow.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert not hasattr(config, "quantization_config")
    fresh = type(narrow)(config)
    assert shapes(fresh) == shapes(narrow)
    assert torch.equal(logits(load(tmp_path)), logits(narrow))


def narrowed(model, block, units):
    """Keep only the first hidden units of one block of a ViT, whose MLP is dense."""
    names = {canonical: name for name, canonical in canonical_names(model).items()}
    for part, select in (("intermediate", selected_rows), ("output", selected_columns)):
        name = names[f"encoder.layer.{block}.{part}.dense"]
        layer = select(model.get_submodule(name), torch.arange(units))
        mark_narrow(layer, (64, 32) if part == "intermediate" else (32, 64))
        replace_module(model, name, layer)


def test_widths_that_differ_stay_in_the_rank_map(tmp_path):
    model = mixed(tiny_vit())
    narrowed(model, 0, 20)
    narrow = to_dense(model, keep_widths=True)
    assert {entry_of(layer).layout for layer in compressed_layers(narrow).values()} == {DENSE}
    stored = narrow.config.quantization_config.factored_layers
    assert sorted(entry.shape for entry in stored.values()) == [(20, 32), (32, 20), (32, 42), (42, 32)]
    narrow.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(narrow))
    assert shapes(to_dense(load(tmp_path))) == shapes(tiny_vit())


def test_one_block_alone_is_not_plain():
    model = tiny_vit()
    narrowed(model, 0, 20)
    before = copy.deepcopy(model.config.to_dict())
    assert not make_plain(model)
    assert model.config.to_dict() == before and len(compressed_layers(model)) == 2


def test_factored_layers_are_not_plain():
    assert not make_plain(mixed(tiny_vit()))
    assert not make_plain(tiny_vit())


def test_models_without_narrow_layers_become_plain_dense_ones():
    model = compressed(tiny_vit(), "factors")
    narrow = to_dense(model, keep_widths=True)
    assert shapes(narrow) == shapes(tiny_vit())
    assert not hasattr(narrow.config, "quantization_config") and not hasattr(narrow, "hf_quantizer")


def test_an_error_leaves_the_model_as_it_was():
    model = mixed(tiny_vit())
    layer = next(
        module for name, module in model.named_modules() if name.endswith("1.mlp.fc2") or "1.output.dense" in name
    )
    layer.factor_b = nn.Sequential(layer.factor_b)
    layer.factor_b.weight = None
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="factor_b of a LowRankLinear is a"):
        to_dense(model, keep_widths=True)
    assert dict(model.named_modules()) == before
