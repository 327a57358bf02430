import pytest
import torch
from checkpoint.layers import pivoted
from models import compressed, mixed, pixels, tiny_vit
from torch import nn

from optimum_mixrank import LowRankLinear
from optimum_mixrank.evaluation.memory import activation_bytes, kept_bytes, weight_bytes


class Chain(nn.Sequential):
    def forward(self, pixel_values):
        return super().forward(pixel_values)


def measured(*layers):
    return activation_bytes(Chain(*layers), {"pixel_values": torch.zeros(4, 8)})


def test_activations_by_hand():
    # The second layer's output is made while its input is alive; then the input is given back.
    assert measured(nn.Linear(8, 16), nn.Linear(16, 4)) == 4 * (4 * 16 + 4 * 4)
    assert measured(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 3)) == 4 * (4 * 16 + 4 * 4)
    # Neither views nor work in place take memory; inputs and weights are there already.
    assert measured(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Unflatten(1, (4, 4))) == 4 * 4 * 16
    assert measured(nn.Identity()) == 0
    assert measured(nn.Flatten(), nn.Unflatten(1, (2, 4))) == 0


def test_activations_grow_with_the_batch_and_the_model_is_left_as_it_was():
    model = tiny_vit().train()
    sizes = [activation_bytes(model, {"pixel_values": pixels(count)}) for count in (1, 2, 4)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert model.training
    half = activation_bytes(tiny_vit().half(), {"pixel_values": pixels(4).half()})
    assert 0 < half < sizes[2]


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_shared_factors_and_narrow_layers(layout):
    dense, model = tiny_vit(), mixed(tiny_vit(), layout)
    assert weight_bytes(model) < weight_bytes(dense)
    # The joint outputs of query, key and value live as long as theirs together.
    inputs = {"pixel_values": pixels(4)}
    assert activation_bytes(model, inputs) <= 1.25 * activation_bytes(dense, inputs)


def test_bytes_of_weights():
    layer = LowRankLinear(36, 50, 7)
    assert weight_bytes(layer) == 4 * (7 * 86 + 50)
    assert weight_bytes(layer.half()) == 2 * (7 * 86 + 50)
    tied = Chain(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    tied[1].weight = tied[0].weight
    # One matrix, two biases, weight, bias, mean, variance and an int64 counter.
    assert weight_bytes(tied) == 4 * (64 + 2 * 8 + 4 * 8) + 8


def test_pivoted_layers_take_no_more_memory_for_activations_than_dense_ones():
    layer = pivoted(64, 32, 20)[1].eval()
    x = {"pixel_values": torch.zeros(1, 32)}
    # The outputs of the first product, and those of the second.
    assert activation_bytes(Chain(layer), x) == 4 * (20 + 64)
    assert kept_bytes(Chain(layer)) == 4 * (64 * 20 + 64)
    dense, model = tiny_vit(), compressed(tiny_vit(), "pivoted").eval()
    for count in (1, 4):
        batch = {"pixel_values": pixels(count)}
        assert activation_bytes(model, batch) <= activation_bytes(dense, batch)
    assert kept_bytes(model) > 0 == kept_bytes(dense)
