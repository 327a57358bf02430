import copy

import pytest
import torch
from torch import nn

from optimum_mixrank import LowRankLinear, PivotedLinear
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.checkpoint.rank_map import FactoredLayer, decode_rows
from optimum_mixrank.decomposition import pivot_rows


SHAPES = {
    "tall": (50, 36, 7),
    "wide": (36, 50, 7),
    "square": (13, 13, 13),
    "one row": (1, 9, 1),
    "one column": (9, 1, 1),
}


def make(m=50, n=36, rank=7, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64) / n**0.5
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64) / rank**0.5
    b = torch.randn(m, generator=generator, dtype=torch.float64) if bias else None
    return LowRankLinear.from_factors(A.to(dtype), B.to(dtype), None if b is None else b.to(dtype))


def inputs(n=36, dtype=torch.float32, lead=(4, 5)):
    return torch.randn(*lead, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


def reference(layer, x):
    A, B = layer.factor_a.weight.detach().double(), layer.factor_b.weight.detach().double()
    y = x.double() @ A.T @ B.T
    return y if layer.bias is None else y + layer.bias.detach().double()


def test_forward_is_the_product_of_the_factors(shape, bias):
    layer = make(*shape, bias=bias)
    for lead in ((), (3,), (2, 3), (2, 1, 3)):
        x = inputs(shape[1], lead=lead)
        assert layer(x).shape == (*lead, shape[0])
        torch.testing.assert_close(layer(x).double(), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_constructor(shape, bias):
    m, n, rank = shape
    layer = LowRankLinear(n, m, rank, bias=bias, dtype=torch.float64)
    assert (layer.out_features, layer.in_features, layer.rank) == shape
    assert layer.factor_a.weight.shape == (rank, n)
    assert layer.factor_b.weight.shape == (m, rank)
    assert layer.factor_a.bias is None
    assert (layer.bias is not None) == bias
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert torch.isfinite(layer(inputs(n, torch.float64))).all()


@pytest.mark.parametrize("rank", [0, -1, 37, 100])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} is outside \[1, 36\] for a layer of shape \[50, 36\]"):
        LowRankLinear(36, 50, rank)


@pytest.mark.parametrize(
    ("A", "B", "b"),
    [((3, 8), (9, 4), None), ((3, 8), (9, 3), 8), ((8,), (9, 3), None)],
    ids=["ranks differ", "bias of another size", "no matrix"],
)
def test_factors_that_do_not_fit_are_refused(A, B, b):
    with pytest.raises(ValueError, match=r"do not fit: A is \[.*\], B is \[.*\], the bias is"):
        LowRankLinear.from_factors(torch.zeros(A), torch.zeros(B), None if b is None else torch.zeros(b))


def test_from_factors_takes_the_values_as_they_are(shape, bias):
    m, n, rank = shape
    A, B = torch.randn(rank, n).half(), torch.randn(m, rank).half()
    b = torch.randn(m).half() if bias else None
    layer = LowRankLinear.from_factors(A, B, b)
    assert (layer.out_features, layer.in_features, layer.rank) == shape
    assert torch.equal(layer.factor_a.weight, A) and torch.equal(layer.factor_b.weight, B)
    assert (layer.bias is None) if b is None else torch.equal(layer.bias, b)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float16}


def test_from_factors_makes_strided_factors_contiguous():
    U = torch.randn(20, 20)
    layer = LowRankLinear.from_factors(U.T[:5], U[:, :5], torch.randn(40)[::2])
    assert all(parameter.is_contiguous() for parameter in layer.parameters())


def test_factors_are_trained_and_the_guard_is_not():
    layer = make()
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {
        "factor_a.weight",
        "factor_b.weight",
        "factor_b.bias",
    }
    layer(inputs()).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in layer.parameters())
    before = layer(inputs())
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    assert not torch.equal(layer(inputs()), before)


def test_gradients_are_those_of_the_definition():
    layer = make(9, 7, 3, dtype=torch.float64)
    A, B, b = layer.factor_a.weight, layer.factor_b.weight, layer.bias

    def forward(x, A, B, b):
        return torch.func.functional_call(layer, {"factor_a.weight": A, "factor_b.weight": B, "factor_b.bias": b}, x)

    assert torch.autograd.gradcheck(forward, (inputs(7, torch.float64).requires_grad_(), A, B, b))


def test_inner_layers_are_ordinary_linears_that_may_be_replaced():
    layer = make()
    assert type(layer.factor_a) is type(layer.factor_b) is nn.Linear
    calls = []
    for name in ("factor_a", "factor_b"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    layer(inputs())
    assert calls == ["factor_a", "factor_b"]
    layer.factor_a = nn.Sequential(nn.Flatten(0, -2), nn.Linear(36, 7))
    assert layer(inputs()).shape == (20, 50)


def test_state_dict_names_and_shapes(bias):
    shapes = {name: tuple(tensor.shape) for name, tensor in make(bias=bias).state_dict().items()}
    expected = {"weight": (0,), "factor_a.weight": (7, 36), "factor_b.weight": (50, 7)}
    assert shapes == expected | ({"factor_b.bias": (50,)} if bias else {})


def test_state_dict_round_trip(shape, bias):
    m, n, rank = shape
    source, target = make(m, n, rank, bias=bias), LowRankLinear(n, m, rank, bias=bias)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs(n)), source(inputs(n)))


def test_a_dense_layer_refuses_the_state_dict():
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .* shape torch\.Size\(\[0\]\)"):
        nn.Linear(36, 50).load_state_dict(make().state_dict(), strict=False)


def test_deepcopy_shares_nothing():
    layer = make().eval()
    copied = copy.deepcopy(layer)
    x = inputs()
    before = layer(x)
    assert torch.equal(copied(x), before)
    assert not copied.training
    with torch.no_grad():
        copied.factor_a.weight.zero_()
        copied.bias.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("cast", "dtype", "tolerance"),
    [
        (nn.Module.half, torch.float16, 5e-3),
        (nn.Module.bfloat16, torch.bfloat16, 5e-2),
        (nn.Module.float, torch.float32, 1e-5),
        (nn.Module.double, torch.float64, 1e-12),
        (lambda module: module.to(torch.float16), torch.float16, 5e-3),
    ],
    ids=["half", "bfloat16", "float", "double", "to"],
)
def test_casts(cast, dtype, tolerance):
    layer = cast(make(dtype=torch.float64))
    x = inputs(dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), reference(make(dtype=torch.float64), x), rtol=0, atol=4 * tolerance)


def test_autocast():
    layer = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs())
    assert output.dtype == torch.bfloat16
    assert layer.factor_a.weight.dtype == torch.float32
    torch.testing.assert_close(output.double(), reference(layer, inputs()), rtol=0, atol=0.1)


def test_meta_device(bias):
    layer = LowRankLinear(36, 50, 7, bias=bias, device="meta", dtype=torch.float16)
    assert all(parameter.is_meta and parameter.dtype == torch.float16 for parameter in layer.parameters())
    assert layer(torch.empty(2, 36, device="meta", dtype=torch.float16)).shape == (2, 50)
    filled = layer.to_empty(device="cpu").float()
    filled.load_state_dict(make(bias=bias).state_dict())
    assert torch.equal(filled(inputs()), make(bias=bias)(inputs()))


def test_construction_under_a_device_context():
    with torch.device("meta"):
        layer = LowRankLinear(36, 50, 7)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.load_state_dict(make().state_dict(), assign=True)
    assert torch.equal(layer(inputs()), make()(inputs()))


def test_compile_without_graph_breaks(bias):
    layer = make(bias=bias)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs()), layer(inputs()))
    assert torch.equal(compiled(inputs(lead=(2, 3))), layer(inputs(lead=(2, 3))))


def test_export():
    layer = make()
    exported = torch.export.export(layer, (inputs(),))
    torch.testing.assert_close(exported.module()(inputs()), layer(inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_linear_multiplies_in_float64_and_rounds_once(shape, bias, dtype):
    layer = make(*shape, bias=bias, dtype=dtype)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear
    assert (dense.out_features, dense.in_features) == shape[:2]
    expected = (layer.factor_b.weight.double() @ layer.factor_a.weight.double()).to(dtype)
    assert dense.weight.dtype == dtype
    assert torch.equal(dense.weight, expected)
    assert (dense.bias is None) if layer.bias is None else torch.equal(dense.bias, layer.bias)


def test_to_linear_keeps_mode_and_trainability():
    layer = make().eval()
    layer.factor_a.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    dense = layer.to_linear()
    assert not dense.training
    assert not dense.weight.requires_grad and not dense.bias.requires_grad
    assert make().to_linear().weight.requires_grad


def test_to_linear_shares_nothing():
    layer = make()
    dense = layer.to_linear()
    with torch.no_grad():
        dense.bias.zero_()
        dense.weight.zero_()
    assert layer.bias.abs().sum() > 0
    torch.testing.assert_close(layer(inputs()).double(), reference(make(), inputs()), rtol=1e-5, atol=1e-5)


def test_repr_shows_shape_rank_and_share():
    assert "in_features=36, out_features=50, rank=7, layout=factors, kept=33.4%" in repr(make())
    assert "bias=False" in repr(make(bias=False))


@pytest.mark.parametrize("name", ["head", "blocks.1.linear", "blocks.0"])
def test_replace_module(name):
    model = nn.Module()
    model.head = nn.Linear(36, 50)
    model.blocks = nn.ModuleList([nn.Linear(36, 50), nn.Module()])
    model.blocks[1].linear = nn.Linear(36, 50)
    names = [each for each, _ in model.named_modules()]
    layer = nn.Identity()
    replace_module(model, name, layer)
    assert model.get_submodule(name) is layer
    assert [each for each, _ in model.named_modules()] == names


def pivoted(m=50, n=36, rank=7, bias=True, dtype=torch.float32, seed=0):
    layer = make(m, n, rank, bias, torch.float64, seed)
    pivots, A, C = pivot_rows(layer.factor_a.weight.detach(), layer.factor_b.weight.detach())
    b = layer.bias.detach().to(dtype) if bias else None
    return layer, PivotedLinear.from_pivots(A.to(dtype), C.to(dtype), pivots, b)


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


def test_pivoted_layers_that_cannot_be():
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
def test_pivots_that_are_not_that_many_rows(pivots):
    with pytest.raises(ValueError, match=r"layer of shape \[5, 4\] and rank 3 are to be 3 different rows, ascending"):
        PivotedLinear(4, 5, 3, pivots=pivots)


def test_an_entry_of_the_rank_map_says_all_but_the_weights():
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
def test_the_product_of_factors_that_were_replaced_is_refused(which):
    for layer in pivoted():
        setattr(layer, which, nn.Sequential(getattr(layer, which)))
        layer.get_submodule(which).weight = layer.get_submodule(which)[0].weight
        with pytest.raises(ValueError, match=rf"{which} of a {type(layer).__name__} is a torch\.nn\..*Sequential"):
            layer.to_linear()
        assert "factor_a" in repr(layer)


def listened_to(layer):
    """The same layer, computed through its modules since somebody listens."""
    layer = copy.deepcopy(layer)
    calls = []
    for name in ("factor_a", "factor_b"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    return layer, calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pivoted_layer_through_its_modules_gives_the_same(bias, dtype):
    _, layer = pivoted(60, 36, 20, bias, dtype)
    other, calls = listened_to(layer)
    x = inputs(dtype=dtype)
    expected = other(x)
    assert calls == ["factor_a", "factor_b"]
    tolerance = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=tolerance)
    # The pivots' own outputs go through a product with the identity, which changes nothing.
    assert torch.equal(layer(x)[..., list(layer.pivots)], layer.factor_a(x))


def test_pivoted_layer_through_its_modules_has_the_same_gradients(bias):
    _, layer = pivoted(60, 36, 20, bias, torch.float64)
    other, _ = listened_to(layer)
    gradients = []
    for each in (layer, other):
        x = inputs(dtype=torch.float64).requires_grad_()
        each(x).sin().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in each.parameters() if parameter.requires_grad)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pivoted_layer_uses_what_has_taken_the_place_of_a_factor():
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


def test_a_pass_on_the_meta_device_does_not_spoil_the_order():
    _, layer = pivoted()
    expected, weights = layer(inputs()), layer.state_dict()
    layer.to("meta")
    assert layer(inputs().to("meta")).shape == expected.shape
    layer.load_state_dict(weights, assign=True)
    assert torch.equal(layer(inputs()), expected)


def test_exported_pivoted_layers_hold_their_factors_as_they_are(bias):
    _, layer = pivoted(60, 36, 20, bias)
    exported = torch.export.export(layer, (inputs(),))
    operations = [str(node.target) for node in exported.graph.nodes]
    assert "aten.gather.default" in operations and "aten.eye.default" not in operations
    torch.testing.assert_close(exported.module()(inputs()), layer(inputs()))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs()), layer(inputs()))
