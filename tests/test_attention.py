"""Attention while a model is trained."""

import pytest
import torch
from compensation.cases import FAMILIES
from models import IMAGE_SIZE
from torch import nn

from optimum_mixrank.runtime.forward import fast_attention_for_training


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
def test_the_output_is_the_same_and_the_model_is_as_before(family):
    model = FAMILIES[family]().double().eval()
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    before, implementation = model(pixel_values).logits, model.config._attn_implementation
    with pytest.raises(KeyError), fast_attention_for_training(model, model):
        assert model.config._attn_implementation == "eager"
        # Transformers takes the softmax of plain attention in float32.
        torch.testing.assert_close(model(pixel_values).logits, before, rtol=1e-5, atol=1e-5)
        raise KeyError
    assert model.config._attn_implementation == implementation


def test_other_modules_implementations_and_many_tokens_are_left_alone():
    eager, large = FAMILIES["vit"](), FAMILIES["vit"]()
    eager.set_attn_implementation("eager")
    large.config.image_size = 17 * large.config.patch_size
    with fast_attention_for_training(nn.Linear(2, 2), eager, large):
        assert eager.config._attn_implementation == "eager"
        assert large.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
