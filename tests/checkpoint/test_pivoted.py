import copy

import pytest
import torch
from checkpoint.layers import inputs, pivoted
from torch import nn

from optimum_mixrank import LowRankLinear, PivotedLinear
from optimum_mixrank.checkpoint.rank_map import FactoredLayer, decode_rows


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


PIVOTED = {"square": (36, 36, 9), "wide": (36, 60, 35), "tall": (60, 36, 36), "one": (2, 3, 1)}


@pytest.mark.parametrize("shape", PIVOTED.values(), ids=PIVOTED)
def test_pivoted_layer_is_the_same_function(shape, bias):
    same, layer = pivoted(*shape, bias=bias, dtype=torch.float64)
    for lead in ((), (3,), (2, 1, 3)):
        x = inputs(shape[1], torch.float64, lead)
        torch.testing.assert_close(layer(x), same(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.product(), same.product(), rtol=1e-10, atol=1e-10)
    m, n, rank = shape
    assert layer.num_values == rank * (m + n) - rank**2
    assert sum(p.numel() for p in layer.parameters()) == layer.num_values + m * bias
    if bias:
        torch.testing.assert_close(layer.bias, same.bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pivoted_layer_in_lower_precision(dtype):
    same, layer = pivoted(dtype=dtype)
    x = inputs(dtype=torch.float64)
    scale = same(x).abs().max().item()
    assert (layer.double()(x) - same(x)).abs().max() < 4 * torch.finfo(dtype).eps * 36**0.5 * scale


@pytest.mark.parametrize("shape", PIVOTED.values(), ids=PIVOTED)
def test_pivoted_layer_round_trips_and_returns_to_dense(shape, bias):
    m, n, rank = shape
    _, layer = pivoted(m, n, rank, bias)
    fresh = PivotedLinear(n, m, rank, bias, pivots=layer.pivots)
    fresh.load_state_dict(layer.state_dict())
    x = inputs(n)
    assert torch.equal(fresh(x), layer(x))
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_set_bias_moves_the_output_and_leaves_the_old_bias_alone():
    for layer in pivoted(dtype=torch.float64):
        other = copy.copy(layer.bias.detach()) + 1
        before = layer(inputs(dtype=torch.float64))
        shared = layer.factor_b.bias
        kept = shared.detach().clone()
        layer.set_bias(other)
        torch.testing.assert_close(layer(inputs(dtype=torch.float64)), before + 1, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.bias, other, rtol=1e-10, atol=1e-10)
        assert torch.equal(shared, kept)


def test_pivoted_layer_compiles_without_graph_breaks(bias):
    _, layer = pivoted(bias=bias)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs()), layer(inputs()))


def test_impossible_pivoted_layers_are_refused():
    with pytest.raises(ValueError, match=r"rank=4 of a pivoted layer of shape \[4, 9\] leaves no row"):
        PivotedLinear(9, 4, 4)
    with pytest.raises(ValueError, match=r"The factors do not fit: A is \[3, 5\], C is \[4, 2\]"):
        PivotedLinear.from_pivots(torch.zeros(3, 5), torch.zeros(4, 2), torch.arange(3))


def test_float16_loses_little_more_in_the_pivoted_layout():
    errors = {}
    for seed in range(5):
        same, half = pivoted(96, 80, 40, dtype=torch.float16, seed=seed)
        x = inputs(80, torch.float64)
        exact = same(x)
        rounded = LowRankLinear.from_factors(
            same.factor_a.weight.half(), same.factor_b.weight.half(), same.bias.half()
        ).double()
        for name, layer in (("pivoted", half.double()), ("factors", rounded)):
            errors[name] = errors.get(name, 0.0) + (layer(x) - exact).square().mean().item()
    assert errors["pivoted"] ** 0.5 < 3 * errors["factors"] ** 0.5


@pytest.mark.parametrize("pivots", [(0, 1), (0, 1, 1), (2, 1, 0), (0, 1, 5), (-1, 0, 1), (0, 1, 2, 3)], ids=str)
def test_wrong_pivots_are_refused(pivots):
    with pytest.raises(ValueError, match=r"layer of shape \[5, 4\] and rank 3 must be 3 different rows, ascending"):
        PivotedLinear(4, 5, 3, pivots=pivots)


def test_rank_map_entry_holds_everything_but_the_weights():
    same, layer = pivoted(50, 36, 7)
    assert same.entry == FactoredLayer(7, True)
    assert decode_rows(layer.entry.pivots) == list(layer.pivots)
    assert "order" not in layer.state_dict()


def test_pivoted_layer_built_under_a_meta_context_knows_its_order():
    with torch.device("meta"):
        layer = PivotedLinear(6, 8, 3, pivots=(1, 4, 6))
    assert layer.factor_a.weight.is_meta
    assert layer.order.tolist() == [3, 0, 4, 5, 1, 6, 2, 7]


@pytest.mark.parametrize("which", ["factor_a", "factor_b"])
def test_the_product_of_replaced_factors_is_refused(which):
    for layer in pivoted():
        setattr(layer, which, nn.Sequential(getattr(layer, which)))
        layer.get_submodule(which).weight = layer.get_submodule(which)[0].weight
        with pytest.raises(ValueError, match=rf"{which} of a {type(layer).__name__} is a torch\.nn\..*Sequential"):
            layer.to_linear()
        assert "factor_a" in repr(layer)


def with_hooks(layer):
    """A copy that calls its factors, because they have hooks, and the list of calls."""
    layer = copy.deepcopy(layer)
    calls = []
    for name in ("factor_a", "factor_b"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    return layer, calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pivoted_layer_through_its_modules_gives_the_same(bias, dtype):
    _, layer = pivoted(60, 36, 20, bias, dtype)
    other, calls = with_hooks(layer)
    x = inputs(dtype=dtype)
    expected = other(x)
    assert calls == ["factor_a", "factor_b"]
    tolerance = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=tolerance)
    # The pivots' own outputs go through a product with the identity, which changes nothing.
    assert torch.equal(layer(x)[..., list(layer.pivots)], layer.factor_a(x))


def test_pivoted_layer_through_its_modules_has_the_same_gradients(bias):
    _, layer = pivoted(60, 36, 20, bias, torch.float64)
    other, _ = with_hooks(layer)
    gradients = []
    for each in (layer, other):
        x = inputs(dtype=torch.float64).requires_grad_()
        each(x).sin().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in each.parameters() if parameter.requires_grad)])
    for ordered, separate in zip(*gradients, strict=True):
        torch.testing.assert_close(ordered, separate)


def test_pivoted_layer_calls_whatever_replaces_a_factor():
    _, layer = pivoted()
    expected = layer(inputs())

    class Twice(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    pivots = list(layer.pivots)
    others = [row for row in range(50) if row not in pivots]
    twice = copy.deepcopy(layer)
    twice.factor_b.__class__ = Twice
    patched = copy.deepcopy(layer)
    patched.factor_b.forward = lambda input, forward=patched.factor_b.forward: 2 * forward(input)
    for each in (twice, patched):
        torch.testing.assert_close(each(inputs())[..., others], 2 * expected[..., others])
        torch.testing.assert_close(each(inputs())[..., pivots], expected[..., pivots])


def test_a_forward_pass_on_the_meta_device_keeps_the_order():
    _, layer = pivoted()
    expected, weights = layer(inputs()), layer.state_dict()
    layer.to("meta")
    assert layer(inputs().to("meta")).shape == expected.shape
    layer.load_state_dict(weights, assign=True)
    assert torch.equal(layer(inputs()), expected)


def test_exported_pivoted_layers_hold_their_factors_unchanged(bias):
    _, layer = pivoted(60, 36, 20, bias)
    exported = torch.export.export(layer, (inputs(),))
    operations = [str(node.target) for node in exported.graph.nodes]
    assert "aten.gather.default" in operations and "aten.eye.default" not in operations
    torch.testing.assert_close(exported.module()(inputs()), layer(inputs()))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs()), layer(inputs()))
