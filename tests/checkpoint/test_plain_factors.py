"""Pivoted layers become plain factors that compute the same."""

import copy

import pytest
import torch
from models import compressed, mixed, pixels, tiny_swin, tiny_vit
from transformers import AutoModelForImageClassification

from optimum_mixrank import LowRankLinear, PivotedLinear, to_plain_factors
from optimum_mixrank.checkpoint.modeling import replace_module


@pytest.mark.parametrize("make", [lambda: compressed(tiny_vit(), "pivoted"), lambda: mixed(tiny_swin(), "pivoted")])
def test_the_model_computes_the_same_and_is_saved_as_what_it_is(make, tmp_path):
    model = make().eval()
    before = {name: each for name, each in model.named_modules() if isinstance(each, PivotedLinear)}
    with torch.no_grad():
        expected = model(pixels()).logits
        plain = to_plain_factors(model)
        torch.testing.assert_close(plain(pixels()).logits, expected, rtol=1e-4, atol=1e-4)
    assert plain is model and not any(isinstance(each, PivotedLinear) for each in model.modules())
    for name, old in before.items():
        new = model.get_submodule(name)
        assert isinstance(new, LowRankLinear) and (new.rank, new.training) == (old.rank, old.training)
        torch.testing.assert_close(new.product(), old.product())
        assert new.num_values == old.num_values + old.rank**2
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(again(pixels()).logits, model(pixels()).logits)


def test_a_model_without_pivoted_layers_stays_as_it_is():
    model = compressed(tiny_vit(), "factors")
    before = copy.deepcopy(model.state_dict())
    after = to_plain_factors(model).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_error_leaves_the_model_as_it_was():
    model = compressed(tiny_vit(), "pivoted")
    name = [name for name, each in model.named_modules() if isinstance(each, PivotedLinear)][-1]
    replace_module(model, f"{name}.factor_b", torch.nn.Sequential(model.get_submodule(f"{name}.factor_b")))
    model.get_submodule(f"{name}.factor_b").weight = model.get_submodule(f"{name}.factor_b")[0].weight
    with pytest.raises(ValueError, match="factor_b of a PivotedLinear"):
        to_plain_factors(model)
    assert not any(isinstance(each, LowRankLinear) for each in model.modules())


@pytest.mark.parametrize("layout", ["pivoted", "factors"])
def test_rotated_factors_spread_what_they_pass_on(layout):
    model = mixed(tiny_vit(), layout).eval()
    with torch.no_grad():
        expected = model(pixels()).logits
        rotated = to_plain_factors(model, rotated=True)
        torch.testing.assert_close(rotated(pixels()).logits, expected, rtol=1e-4, atol=1e-4)
    layers = [each for each in model.modules() if isinstance(each, LowRankLinear)]
    assert layers
    for layer in layers:
        B = layer.factor_b.weight.double()
        torch.testing.assert_close(B.T @ B, torch.eye(layer.rank, dtype=torch.float64), atol=1e-5, rtol=0)
