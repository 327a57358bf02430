"""Balanced factors during training."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images

from optimum_mixrank import FactoredLinear, LowRankLinear
from optimum_mixrank.checkpoint.narrowing import narrow_from
from optimum_mixrank.compensation.training.balanced import balanced_factors


def kinds_of(model):
    """Return the classes of factored layers and of dense ones that have lost units, by name."""
    return {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear) or narrow_from(module)
    }


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_balanced_factors_are_the_same_function_and_the_layout_is_restored(layout):
    model, _ = compress(FAMILIES["vit"](), config(compensation=[], layout=layout))
    model = model.double().eval()
    x = images(3).double()
    with torch.no_grad():
        before = model(x).logits
        kinds = kinds_of(model)
        with balanced_factors(model) as names:
            assert set(names) == set(kinds)
            torch.testing.assert_close(model(x).logits, before, rtol=1e-8, atol=1e-8)
            for name in names:
                layer = model.get_submodule(name)
                A, B = layer.factor_a.weight, layer.factor_b.weight
                assert isinstance(layer, LowRankLinear)
                torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(model(x).logits, before, rtol=1e-8, atol=1e-8)
    assert kinds_of(model) == kinds


def test_an_exception_restores_the_layers():
    model, _ = compress(FAMILIES["vit"]().half(), config(compensation=[], metric="second_moment"))
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="in between"), balanced_factors(model):
        assert model.dtype == torch.float32
        raise RuntimeError("in between")
    assert dict(model.named_modules()) == before and model.dtype == torch.float16
