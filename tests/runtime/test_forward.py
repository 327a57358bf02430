"""Models are as before after a forward pass in evaluation mode and after training."""

import re

import pytest
import torch
from compensation.cases import FAMILIES
from models import IMAGE_SIZE
from torch import nn

from optimum_mixrank.runtime.forward import (
    activation_gradients,
    black_image,
    evaluation_mode,
    fast_attention_for_training,
)


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)), nn.BatchNorm1d(2)).train()
    model[1].training = False
    model[2].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_everything_is_in_evaluation_mode_without_gradients(model):
    with evaluation_mode(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
        assert not model(torch.ones(3, 2)).requires_grad
    assert torch.is_grad_enabled()


def test_every_module_gets_its_own_mode_back(model):
    before = modes(model)
    assert before == [True, True, False, True, True, False]
    with evaluation_mode(model):
        pass
    assert modes(model) == before


def test_modes_come_back_after_an_exception(model):
    before = modes(model)
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_gradients_stay_off_where_they_were_off(model):
    with torch.no_grad():
        with evaluation_mode(model):
            pass
        assert not torch.is_grad_enabled()


def test_only_activations_get_gradients_and_parameters_are_as_trainable_as_before(model):
    model[0].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    inputs = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(KeyError), torch.no_grad(), activation_gradients(model):
        model.eval()(inputs).sum().backward()
        raise KeyError
    assert inputs.grad is not None and all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
def test_plain_attention_gives_the_same_output_and_is_undone(family):
    model = FAMILIES[family]().double().eval()
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    before, implementation = model(pixel_values).logits, model.config._attn_implementation
    with pytest.raises(KeyError), fast_attention_for_training(model, model):
        assert model.config._attn_implementation == "eager"
        # Transformers takes the softmax of plain attention in float32.
        torch.testing.assert_close(model(pixel_values).logits, before, rtol=1e-5, atol=1e-5)
        raise KeyError
    assert model.config._attn_implementation == implementation


def test_attention_is_unchanged_without_fusion_or_with_many_tokens():
    eager, large = FAMILIES["vit"](), FAMILIES["vit"]()
    eager.set_attn_implementation("eager")
    large.config.image_size = 17 * large.config.patch_size
    with fast_attention_for_training(nn.Linear(2, 2), eager, large):
        assert eager.config._attn_implementation == "eager"
        assert large.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("shape", [32, (3, 32), (3, 0, 32), (3, 32.0, 32), (1, 3, 32, 32)], ids=str)
def test_what_is_not_the_shape_of_an_image(shape):
    with pytest.raises(
        ValueError, match=rf"pixel_values_shape={re.escape(str(shape))} is not \(channels, height, width\)"
    ):
        black_image(nn.Linear(2, 2), shape)
