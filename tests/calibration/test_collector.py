"""Which statistics layers share, and how often a layer counts."""

import pytest
import torch
from calibration.layers import ALL, MODELS, batches, covariance, hook_count, required_for
from models import pixels, tiny_vit
from torch import nn

from optimum_mixrank.calibration.collect import collect_statistics
from optimum_mixrank.calibration.collector import StatisticsCollector
from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.decomposition import Statistic


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_query_key_and_value_share_their_input_statistics(make):
    model = make()
    names = {target.name: target.canonical_name.rpartition(".")[2] for target in encoder_linears(model)}
    collected, _ = collect_statistics(model, batches(2), required_for(model))
    of = {kind: [collected[name] for name in names if names[name] == kind] for kind in ("query", "key", "value")}
    assert len(of["query"]) == sum(kind == "query" for kind in names.values()) > 0
    for query, key, value in zip(of["query"], of["key"], of["value"], strict=True):
        for field in ("input_mean", "input_variance", "input_covariance", "representative_input"):
            assert getattr(query, field) is getattr(key, field) is getattr(value, field)
        assert query.output_covariance is not key.output_covariance
    # One Gram for the three, so four inputs of a block and that of a patch merging.
    grams = {id(statistics.input_covariance) for statistics in collected.values()}
    assert len(grams) == len(collected) - 2 * len(of["query"])


def test_a_layer_that_asks_for_more_than_its_sharers():
    model = tiny_vit()
    names = [
        t.name for t in encoder_linears(model) if t.canonical_name.startswith("encoder.layer.0.attention.attention")
    ]
    fields = [{Statistic.INPUT_MEAN}, {Statistic.INPUT_COVARIANCE}, {Statistic.INPUT_MEAN, Statistic.INPUT_VARIANCE}]
    required = {name: frozenset(field) for name, field in zip(names, fields, strict=True)}
    collected, _ = collect_statistics(model, batches(3, 4), required)
    everything, _ = collect_statistics(model, batches(3, 4), dict.fromkeys(names, ALL))
    for name in names:
        assert collected[name].num_tokens == everything[name].num_tokens == 7 * 17
        for statistic in required[name]:
            ours, theirs = getattr(collected[name], statistic.value), getattr(everything[name], statistic.value)
            torch.testing.assert_close(ours, theirs)


def test_a_layer_that_is_never_called_is_named():
    model = tiny_vit()
    model.unused = nn.Linear(3, 4)
    with pytest.raises(
        ValueError, match="1 targeted layers were not called .* 'unused'. Leave them out with exclude_modules"
    ):
        collect_statistics(model, batches(2), {**required_for(model), "unused": ALL})


def test_a_layer_that_is_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pixel_values):
            return self.linear(self.linear(pixel_values))

    model = Twice()
    inputs = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    collected, _ = collect_statistics(model, [Batch(inputs)], {"linear": ALL})
    with torch.no_grad():
        both = torch.cat([inputs, model.linear(inputs)]).double()
    assert collected["linear"].num_tokens == 20
    torch.testing.assert_close(collected["linear"].input_covariance, covariance(both), rtol=1e-5, atol=1e-6)


def test_layers_that_share_an_input_only_at_times_are_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.calls = 0

        def forward(self, pixel_values):
            self.calls += 1
            return self.one(pixel_values) + self.two(pixel_values if self.calls == 1 else pixel_values + 1)

    batch = Batch(torch.ones(2, 4))
    required = {"one": frozenset({Statistic.INPUT_MEAN}), "two": frozenset({Statistic.INPUT_MEAN})}
    with pytest.raises(RuntimeError, match=r"'two' was called with the input of 'one' at first .* exclude_modules"):
        collect_statistics(Fickle(), [batch, batch], required)


def test_collector_is_a_context_manager():
    model = tiny_vit()
    with StatisticsCollector(model, required_for(model, {Statistic.INPUT_MEAN})) as collector, torch.no_grad():
        model(pixel_values=pixels(2))
    assert hook_count(model) == 0
    assert collector.result().keys() == required_for(model).keys()
