"""Outputs of the original that are not cached are computed again."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config

from optimum_mixrank.compensation.compensator import ActivationStorage
from optimum_mixrank.compensation.layerwise.targets import OriginalOutputs
from optimum_mixrank.pipeline import compress as pipeline


@pytest.mark.parametrize("max_bytes", [0, 1_000_000], ids=["nothing fits", "some batches fit"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_outputs_that_are_computed_again_give_the_same_model(monkeypatch, family, max_bytes):
    settings = config(compensation=["sequential"])
    cached, _ = compress(FAMILIES[family](), settings)
    shares = []
    of = OriginalOutputs.of

    def spy(outputs, index, names):
        shares.append(len(outputs._cached) / len(outputs._replay.calls))
        return of(outputs, index, names)

    monkeypatch.setattr(OriginalOutputs, "of", spy)
    monkeypatch.setattr(pipeline, "IN_MEMORY", ActivationStorage(max_output_bytes=max_bytes))
    again, _ = compress(FAMILIES[family](), settings)
    assert any(0 < share < 1 for share in shares) if max_bytes else not any(shares)
    assert all(
        torch.equal(a, b) for a, b in zip(cached.state_dict().values(), again.state_dict().values(), strict=True)
    )
