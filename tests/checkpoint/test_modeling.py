import copy
import pickle

import pytest
import torch
from checkpoint.layers import inputs, low_rank
from models import pixels, tiny_vit
from torch import nn

from optimum_mixrank import LowRankLinear, MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.checkpoint.modeling import FactoredLinear, replace_module


SHAPES = {
    "tall": (50, 36, 7),
    "wide": (36, 50, 7),
    "square": (13, 13, 13),
    "one row": (1, 9, 1),
    "one column": (9, 1, 1),
}


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
    layer = low_rank(*shape, bias=bias)
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


def test_from_factors_keeps_values_and_dtype(shape, bias):
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
    layer = low_rank()
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
    layer = low_rank(9, 7, 3, dtype=torch.float64)
    A, B, b = layer.factor_a.weight, layer.factor_b.weight, layer.bias

    def forward(x, A, B, b):
        return torch.func.functional_call(layer, {"factor_a.weight": A, "factor_b.weight": B, "factor_b.bias": b}, x)

    assert torch.autograd.gradcheck(forward, (inputs(7, torch.float64).requires_grad_(), A, B, b))


def test_inner_layers_are_ordinary_linears_that_may_be_replaced():
    layer = low_rank()
    assert type(layer.factor_a) is type(layer.factor_b) is nn.Linear
    calls = []
    for name in ("factor_a", "factor_b"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    layer(inputs())
    assert calls == ["factor_a", "factor_b"]
    layer.factor_a = nn.Sequential(nn.Flatten(0, -2), nn.Linear(36, 7))
    assert layer(inputs()).shape == (20, 50)


def test_state_dict_names_and_shapes(bias):
    shapes = {name: tuple(tensor.shape) for name, tensor in low_rank(bias=bias).state_dict().items()}
    expected = {"weight": (0,), "factor_a.weight": (7, 36), "factor_b.weight": (50, 7)}
    assert shapes == expected | ({"factor_b.bias": (50,)} if bias else {})


def test_state_dict_round_trip(shape, bias):
    m, n, rank = shape
    source, target = low_rank(m, n, rank, bias=bias), LowRankLinear(n, m, rank, bias=bias)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs(n)), source(inputs(n)))


def test_a_dense_layer_refuses_the_state_dict():
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .* shape torch\.Size\(\[0\]\)"):
        nn.Linear(36, 50).load_state_dict(low_rank().state_dict(), strict=False)


def test_deepcopy_shares_nothing():
    layer = low_rank().eval()
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
    layer = cast(low_rank(dtype=torch.float64))
    x = inputs(dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(x).dtype == dtype
    torch.testing.assert_close(
        layer(x).double(), reference(low_rank(dtype=torch.float64), x), rtol=0, atol=4 * tolerance
    )


def test_autocast():
    layer = low_rank()
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
    filled.load_state_dict(low_rank(bias=bias).state_dict())
    assert torch.equal(filled(inputs()), low_rank(bias=bias)(inputs()))


def test_construction_under_a_device_context():
    with torch.device("meta"):
        layer = LowRankLinear(36, 50, 7)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.load_state_dict(low_rank().state_dict(), assign=True)
    assert torch.equal(layer(inputs()), low_rank()(inputs()))


def test_compile_without_graph_breaks(bias):
    layer = low_rank(bias=bias)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs()), layer(inputs()))
    assert torch.equal(compiled(inputs(lead=(2, 3))), layer(inputs(lead=(2, 3))))


def test_export():
    layer = low_rank()
    exported = torch.export.export(layer, (inputs(),))
    torch.testing.assert_close(exported.module()(inputs()), layer(inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_linear_multiplies_in_float64_and_rounds_once(shape, bias, dtype):
    layer = low_rank(*shape, bias=bias, dtype=dtype)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear
    assert (dense.out_features, dense.in_features) == shape[:2]
    expected = (layer.factor_b.weight.double() @ layer.factor_a.weight.double()).to(dtype)
    assert dense.weight.dtype == dtype
    assert torch.equal(dense.weight, expected)
    assert (dense.bias is None) if layer.bias is None else torch.equal(dense.bias, layer.bias)


def test_to_linear_keeps_mode_and_trainability():
    layer = low_rank().eval()
    layer.factor_a.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    dense = layer.to_linear()
    assert not dense.training
    assert not dense.weight.requires_grad and not dense.bias.requires_grad
    assert low_rank().to_linear().weight.requires_grad


def test_to_linear_shares_nothing():
    layer = low_rank()
    dense = layer.to_linear()
    with torch.no_grad():
        dense.bias.zero_()
        dense.weight.zero_()
    assert layer.bias.abs().sum() > 0
    torch.testing.assert_close(layer(inputs()).double(), reference(low_rank(), inputs()), rtol=1e-5, atol=1e-5)


def test_repr_shows_shape_rank_and_share():
    assert "in_features=36, out_features=50, rank=7, layout=factors, kept=33.4%" in repr(low_rank())
    assert "bias=False" in repr(low_rank(bias=False))


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


class Listed(nn.Module):
    """Calls its layers through a list of its own, as the prediction heads of OneFormer do."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)
        for position, layer in enumerate(layers):
            self.add_module(str(position), layer)

    def forward(self, x, *rest):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_that_is_called_through_a_list_is_replaced_there_too():
    model = tiny_vit()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.out_features > module.in_features:
            replace_module(model, name, Listed(nn.Linear(32, 16), nn.Linear(16, 64)))
    compressor = MixRankCompressor(model)
    config = MixRankConfig(target_modules=["0", "1"], compression_scope="targets", recipe="fast", compensation=[])
    made, images = compressor.compress(config, [pixels(8)]), pixels(4)
    layers = [module for module in made.modules() if isinstance(module, FactoredLinear)]
    assert layers and all(any(each is layer for each in listed_by(made)) for layer in layers)
    with torch.no_grad():
        assert not torch.allclose(made(images).logits, model(images).logits)
        expected = made(images).logits
        assert torch.allclose(to_dense(made)(images).logits, expected, atol=1e-4)


def listed_by(model):
    return [layer for module in model.modules() if isinstance(module, Listed) for layer in module.layers]


def trained_guards(model):
    """Ask for all gradients in every way there is; return the empty parameters that would be trained."""
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
        parameter.requires_grad_()
    assert model.factor_a.weight.requires_grad
    return [name for name, parameter in model.named_parameters() if not parameter.numel() and parameter.requires_grad]


@pytest.mark.parametrize(
    "changed",
    [
        lambda layer: layer,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.half().double(),
        lambda layer: layer.to("meta").to_empty(device="cpu"),
        lambda layer: layer.load_state_dict(layer.state_dict(), assign=True) and layer,
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.empty(0))) or layer,
    ],
    ids=["new", "copy", "pickled", "converted", "moved", "assigned state", "assigned"],
)
def test_the_empty_weight_is_never_trained(changed):
    layer = changed(low_rank(50, 36, 7))
    assert trained_guards(layer) == []
    assert layer.weight.numel() == 0 and "weight" in layer.state_dict()
