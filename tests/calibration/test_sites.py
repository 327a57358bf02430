"""Which layers are decided together, in real architectures."""

from unittest.mock import patch

import pytest
import torch
from models import tiny_deit, tiny_swin, tiny_swinv2, tiny_vit
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from optimum_mixrank.calibration.sites import Mlp, SharedInput, _recorded, find_sites
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.checkpoint.names import Target


SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def sites_of(model, structures=("shared", "width"), targets=None):
    model = model.eval()
    return find_sites(model, encoder_linears(model) if targets is None else targets, structures)


def names(sites):
    return [[layer.canonical_name.rpartition(".")[2] for layer in site.layers] for site in sites]


@pytest.mark.parametrize("model", [tiny_vit, tiny_deit, tiny_swin])
def test_query_key_and_value_share_an_input_and_two_layers_are_an_mlp(model):
    sites = sites_of(model())
    assert {type(site) for site in sites} == {SharedInput, Mlp}
    assert all(len(site.layers) == (3 if isinstance(site, SharedInput) else 2) for site in sites)
    assert sites[0].name.endswith("query+key+value")
    assert sites[1].name == " > ".join(layer.canonical_name for layer in sites[1].layers)
    taken = [layer.name for site in sites for layer in site.layers]
    assert len(set(taken)) == len(taken)


def test_a_key_without_bias_stays_alone():
    for model in (BeitModel(BeitConfig(**SIZES, intermediate_size=64)), tiny_swinv2()):
        [first, *_] = [site for site in sites_of(model) if isinstance(site, SharedInput)]
        assert names([first]) == [["query", "value"]]


def test_a_gate_and_its_value_are_one_layer():
    sites = sites_of(Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True)))
    [mlp] = [site for site in sites if isinstance(site, Mlp)]
    assert mlp.first.module.out_features == 2 * mlp.num_units
    # Releases of Transformers have one layer for both, or two.
    assert mlp.has_fused_gate == (not mlp.first.members)


def test_towers():
    sites = sites_of(SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)))
    assert names(sites) == [["q_proj", "k_proj", "v_proj"], ["fc1", "fc2"]]


@pytest.mark.parametrize(
    ("structures", "kinds"), [((), set()), (("rank",), set()), (("shared",), {SharedInput}), (("width",), {Mlp})]
)
def test_only_the_structures_that_are_asked_for(structures, kinds):
    assert {type(site) for site in sites_of(tiny_vit(), structures)} == kinds


def test_only_the_layers_that_are_given():
    model = tiny_vit()
    without = [
        target for target in encoder_linears(model) if not target.canonical_name.endswith(("key", "0.output.dense"))
    ]
    sites = sites_of(model, targets=without)
    assert ["query", "value"] in names(sites)
    assert sum(isinstance(site, Mlp) for site in sites) == 1


def change_mlp(model, forward):
    """Give the MLP of the first block another forward pass."""
    block = next(module for module in model.modules() if type(module).__name__ == "ViTLayer")
    first = getattr(block, "intermediate", None)
    layers = (first.dense, block.output.dense) if first is not None else (block.mlp.fc1, block.mlp.fc2)
    layers[1].register_forward_pre_hook(lambda module, args: (forward(args[0]), *args[1:]))
    return model


@pytest.mark.parametrize(
    "between",
    [
        lambda hidden: nn.functional.layer_norm(hidden, hidden.shape[-1:]),
        lambda hidden: hidden.flip(-1),
        lambda hidden: hidden + hidden.roll(1, dims=1),
        lambda hidden: hidden * torch.linspace(0, 1, 64),
    ],
    ids=["norm over units", "other units", "other tokens", "a vector of fixed size"],
)
def test_units_stay_where_more_than_an_activation_depends_on_them(between):
    mlps = [site for site in sites_of(change_mlp(tiny_vit(), between)) if isinstance(site, Mlp)]
    assert len(mlps) == 1
    assert "1" in mlps[0].name


def test_a_model_that_does_not_run_has_no_sites():
    model = tiny_vit()
    targets = encoder_linears(model)
    model.config.image_size = 48
    with patch("optimum_mixrank.calibration.sites.logger.warning") as warning:
        assert find_sites(model, targets, ["shared"]) == []
    assert "does not run on the first images" in warning.call_args.args[0]


def test_the_model_is_left_as_it_was():
    model = tiny_vit().train()
    before = {name: id(module) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    find_sites(model, encoder_linears(model), ["shared", "width"])
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_is_called_twice_joins_no_group():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.first(x)
            self.twice(y), self.twice(y)
            return self.last(y)

    model = Twice()
    targets = [Target(name, name, module) for name, module in model.named_children()]
    with _recorded(targets) as trace:
        model(torch.randn(2, 4))
    # The last layer sees the input of the one that is left out, not that of the first.
    assert [[target.name for target in group] for group in trace.groups()] == [["first"], ["last"]]
