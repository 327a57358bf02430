"""The groups in which a compressed model is trained."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images
from torch import nn

from optimum_mixrank import FactoredLinear
from optimum_mixrank.compensation.training.balanced import balanced_factors
from optimum_mixrank.compensation.training.groups import factor_groups, vector_group


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_groups_hold_the_trained_parameters_and_the_function_stays_the_same(family):
    model, _ = compress(FAMILIES[family](), config(compensation=[]))
    model.eval()
    batch = images(8)
    with torch.no_grad():
        before = model(batch).logits
    with balanced_factors(model) as names:
        groups = factor_groups(model, names, batch, 4, 0)
        vectors = vector_group(model, names, model.base_model)
        with torch.no_grad():
            torch.testing.assert_close(model(batch).logits, before, rtol=1e-4, atol=1e-5)
        grouped = {id(p) for pair in groups.values() for group in pair for p in group["params"]}
        grouped |= {id(p) for p in vectors["params"]}
        layers = {name for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
        norms = {name for name, module in model.base_model.named_modules() if isinstance(module, nn.LayerNorm)}
        prefix = f"{model.base_model_prefix}."
        expected = {
            id(parameter)
            for name, parameter in model.named_parameters()
            if parameter.numel()
            and (
                any(name.startswith(f"{layer}.") for layer in layers)
                or any(name.startswith(f"{prefix}{norm}.") for norm in norms)
            )
        }
        assert grouped == expected
        assert all(
            parameter.requires_grad and parameter.grad is None for parameter in model.parameters() if parameter.numel()
        )


def test_layers_that_share_an_input_share_its_coordinates():
    model, _ = compress(FAMILIES["vit"](), config(compensation=[]))
    with balanced_factors(model) as names:
        groups = factor_groups(model.eval(), names, images(8), 8, 0)
        matrices = {id(group["right"]) for pair in groups.values() for group in pair if "right" in group}
        assert len(matrices) < len(groups)
