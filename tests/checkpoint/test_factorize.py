"""Products whose pivoted layout would need large coefficients."""

import pytest
import torch
from models import pixels, tiny_vit
from torch import nn
from transformers import AutoModelForImageClassification

from optimum_mixrank import LowRankLinear, MixRankCompressor, MixRankConfig, PivotedLinear
from optimum_mixrank.checkpoint import factorize
from optimum_mixrank.compensation.training import balanced


def test_coefficients_that_rounding_would_lose_are_not_stored(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(10, 14)
    A, B = torch.randn(6, 10, generator=generator).double(), torch.randn(14, 6, generator=generator).double()
    assert isinstance(factorize.factored_linear(dense, A, B, "pivoted"), PivotedLinear)
    monkeypatch.setattr(factorize, "MAX_GROWTH", 0.5)
    layer = factorize.factored_linear(dense, A, B, "pivoted")
    assert isinstance(layer, LowRankLinear)
    # 6 * 24 - 36 values hold factors of rank 4: the best approximation of the product there is.
    assert layer.rank == 4
    error = torch.linalg.matrix_norm(layer.product() - B @ A)
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(B @ A)[4:].norm()), rel=1e-4)


@pytest.mark.parametrize("compensation", [[], ["sequential"], ["sequential", "blocks"]], ids=str)
def test_a_model_in_which_they_occur_keeps_the_budget_and_reloads(compensation, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(factorize, "MAX_GROWTH", 0.9)
    compressor = MixRankCompressor(tiny_vit())
    settings = {"compression_scope": "targets", "compression_ratio": 0.4, "epochs": 1}
    compressor.compress(MixRankConfig(**settings, compensation=compensation), [pixels(32)], tmp_path)
    report = compressor.report
    assert report.kept_of_encoder <= 0.6
    assert "Stored as plain factors of a lower rank, within the budget, because layout='pivoted' would" in caplog.text
    assert report.predicted_loss == pytest.approx(sum(layer.predicted_loss or 0 for layer in report.layers))
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    kinds = {type(module) for module in reloaded.modules() if isinstance(module, LowRankLinear | PivotedLinear)}
    assert LowRankLinear in kinds


@pytest.mark.parametrize("step", ["blocks", "distillation"])
def test_they_may_occur_after_training_too(step, monkeypatch):
    monkeypatch.setattr(balanced, "factored_linear", lambda *args: in_few_values(*args, limit=0.9))
    compressor = MixRankCompressor(tiny_vit())
    settings = {"compression_scope": "targets", "compression_ratio": 0.4, "epochs": 1, "held_out_ratio": 0.5}
    model = compressor.compress(MixRankConfig(**settings, metric="svd", compensation=[step]), [pixels(32)])
    [result] = compressor.report.compensation
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert bool(layers) == result["kept"]
    assert compressor.report.kept_of_encoder <= 0.6


def in_few_values(*args, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorize, "MAX_GROWTH", limit)
        return factorize.factored_linear(*args)
