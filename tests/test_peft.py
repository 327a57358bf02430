"""LoRA on the factors of compressed models: attach, train, save, load, merge."""

import pytest
import torch
from models import compressed, mixed, pixels, tiny_deit, tiny_swin, tiny_vit
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from optimum_mixrank import FactoredLinear, to_dense
from optimum_mixrank.checkpoint.rank_map import LAYOUT_NAMES
from optimum_mixrank.checkpoint.shared import SharedLinear


peft = pytest.importorskip("peft")

FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}
TARGETS = {
    "all linear": "all-linear",
    "factors": ["factor_a", "factor_b"],
    "query and value": r".*(query|q_proj|value|v_proj)\.factor_b",
}


CASES = [(family, layout) for family in FAMILIES for layout in LAYOUT_NAMES]
INITIALIZATIONS = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def checkpoint(request, tmp_path_factory):
    family, layout = request.param
    folder = tmp_path_factory.mktemp("base")
    compressed(FAMILIES[family](), layout).save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels()).logits


def factored(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def train(model):
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(pixel_values=pixels()).logits, torch.arange(4)).backward()
        optimizer.step()
    return model


def adapters():
    for case in CASES:
        for name, targets in TARGETS.items():
            yield pytest.param(case, targets, {}, id=f"{'-'.join(case)}-{name}")
    for case in (("vit", "factors"), ("swin", "pivoted")):
        for name, options in INITIALIZATIONS.items():
            yield pytest.param(case, TARGETS["factors"], options, id=f"{'-'.join(case)}-{name}")


@pytest.mark.parametrize(("checkpoint", "targets", "options"), adapters(), indirect=["checkpoint"])
def test_attach_train_save_load_merge(checkpoint, tmp_path, targets, options):
    base = load(checkpoint)
    expected, layers = logits(base), factored(base)
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"], **options)
    adapted = peft.get_peft_model(base, config)
    on_factors = [each for layer in layers.values() for each in (layer.factor_a, layer.factor_b)]
    assert any(isinstance(each, peft.tuners.lora.LoraLayer) for each in on_factors)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)

    trained = logits(train(adapted))
    assert (trained - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)

    merged = adapted.merge_and_unload()
    assert all(type(each) is nn.Linear for layer in layers.values() for each in (layer.factor_a, layer.factor_b))
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert factored(again).keys() == layers.keys()
    assert again.num_parameters() == load(checkpoint).num_parameters()
    assert torch.equal(logits(again), logits(merged))
    torch.testing.assert_close(logits(to_dense(again)), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("targets", ["all-linear", ["factor_a", "factor_b"], r".*(query|q_proj)\.joint\.factor_b"])
def test_layers_that_share_a_factor_or_have_lost_units(layout, targets, tmp_path):
    mixed(tiny_vit(), layout).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    expected = logits(base)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    trained = logits(train(adapted))
    assert (trained - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)

    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert {type(each) for each in again.modules()} >= {SharedLinear}
    assert torch.equal(logits(again), logits(merged))
    torch.testing.assert_close(logits(to_dense(again)), trained, atol=1e-3, rtol=1e-3)


def test_adapters_by_transformers_itself(checkpoint, tmp_path):
    model = load(checkpoint)
    expected = logits(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted = logits(model)
    assert not torch.equal(adapted, expected)
    model.save_pretrained(tmp_path / "adapter")
    # The adapter's folder names its base model, so it opens by itself too.
    assert torch.equal(logits(load(tmp_path / "adapter")), adapted)
    model.disable_adapters()
    assert torch.equal(logits(model), expected)


def test_adapters_are_not_lost_on_the_way_to_dense(checkpoint):
    model = load(checkpoint)
    before = factored(model)
    # Only in the last layer: the first ones could be multiplied.
    name = list(before)[-1]
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[f"{name}.factor_b"], init_lora_weights=False))
    expected = logits(model)
    with pytest.raises(
        ValueError, match=r"factor_b of a .* is a peft\..*Merge adapters first \(`merge_and_unload\(\)`\)"
    ):
        to_dense(model)
    assert factored(model) == before and torch.equal(logits(model), expected)
