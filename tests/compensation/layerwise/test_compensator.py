"""What both layer-wise steps have in common: their errors, and their progress bar."""

import pytest
from compensation.cases import FAMILIES, compress, config
from compensation.layerwise.cases import activations, run
from torch.testing import assert_close
from transformers.utils import logging

from optimum_mixrank.calibration.targets import encoder_linears


def spread(values, centred):
    return (values - values.mean(0) * centred).square().sum()


@pytest.mark.parametrize(("family", "step"), [("vit", "sequential"), ("vit", "residual"), ("swin", "residual")])
@pytest.mark.usefixtures("short_residuals")
def test_reported_errors_are_those_of_the_outputs_of_layers(family, step):
    original, compressed, result, pixels = run(family, step)
    assert result["kept"]
    errors = result["details"]["layer_errors"]
    # For "sequential", only layers that do not write to the residual stream have their own output as target.
    targets = [
        target
        for target in encoder_linears(original)
        if target.canonical_name in errors
        and (step == "residual" or any(part in target.canonical_name for part in ("query", "key", "value", "fc1")))
    ]
    assert len(targets) >= 5
    for target in targets:
        expected = activations(original, target.name, pixels)[1]
        # Its predecessors are final, so the inputs are those that it was computed for.
        outputs = activations(compressed, target.name, pixels)[1]
        has_bias = target.module.bias is not None
        error = spread(expected - outputs, has_bias) / spread(expected, has_bias)
        assert errors[target.canonical_name] == pytest.approx(float(error), rel=1e-3)
        if has_bias:
            assert_close(outputs.mean(0), expected.mean(0), rtol=0, atol=1e-4)


def test_the_progress_bar_advances_with_every_group_of_layers(monkeypatch):
    bars, tqdm = [], logging.tqdm

    def recording(*args, **kwargs):
        bar = tqdm(*args, **kwargs)
        updates, update = [], bar.update
        bar.update = lambda n=1: updates.append(n) or update(n)
        bars.append((kwargs, updates))
        return bar

    monkeypatch.setattr(logging, "tqdm", recording)
    compress(FAMILIES["vit"](), config(compensation=["sequential"]))
    [(options, updates)] = [each for each in bars if each[0].get("desc") == "Solving in sequence"]
    assert updates[:4] == [3, 1, 1, 1] and sum(updates) == options["total"]
