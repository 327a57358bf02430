"""Layers that share their first factor compute what the dense ones do, in two products, whoever calls them."""

import copy
import pickle
import threading

import pytest
import torch
from checkpoint.layers import inputs, low_rank, pivoted
from models import mixed, pixels, tiny_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_mixrank.checkpoint.shared import SharedLinear, member_sizes, share


SIZES, MEMBERS = (20, 10, 20), ("block.query", "block.key", "block.value")


def joint(layout="factors", bias=True, dtype=torch.float32):
    return pivoted(bias=bias, dtype=dtype)[1] if layout == "pivoted" else low_rank(bias=bias, dtype=dtype)


@pytest.fixture(params=["factors", "pivoted"])
def layout(request):
    return request.param


@pytest.fixture
def group(layout):
    return nn.ModuleList(share(joint(layout), SIZES, MEMBERS))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return function(*args, **(kwargs or {}))


def products(call):
    with Products() as counter, torch.no_grad():
        call()
    return counter.count


def call_all(group, x):
    return torch.cat([layer(x) for layer in group], dim=-1)


def memo(group):
    return group[0]._memo.result


@pytest.mark.parametrize("bias", [True, False])
def test_members_are_the_rows_of_the_joint_layer(layout, bias):
    whole = joint(layout, bias)
    group, x = share(whole, SIZES, MEMBERS), inputs()
    expected = whole.to_linear()
    for layer, rows in zip(group, torch.arange(50).split(SIZES), strict=True):
        assert (layer.out_features, layer.in_features, layer.rank) == (len(rows), 36, 7)
        assert torch.equal(layer.product(), whole.product()[rows])
        assert torch.equal(layer.bias, whole.bias[rows]) if bias else layer.bias is None
        dense = layer.to_linear()
        assert type(dense) is nn.Linear and torch.equal(dense.weight, expected.weight[rows])
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), whole(x)[..., rows])


def test_values_of_the_members_add_up(layout):
    whole = joint(layout)
    assert sum(layer.num_values for layer in share(whole, SIZES, MEMBERS)) == whole.num_values


def test_only_the_first_stores_tensors_of_its_own(group):
    names = {name for name in group.state_dict() if not name.endswith(("0.weight", "1.weight", "2.weight"))}
    assert names == {f"0.joint.{name}" for name in joint().state_dict()} | names
    assert all(name.startswith("0.joint.") for name in names)
    assert all(layer.weight.numel() == 0 and not layer.weight.requires_grad for layer in group)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_two_products_for_all_members_in_any_order(group, order):
    x, expected = inputs(), group[0].joint(inputs())
    outputs = {}
    assert products(lambda: outputs.update({each: group[each](x) for each in order})) == 2
    assert torch.equal(torch.cat([outputs[each] for each in range(3)], dim=-1), expected)
    # Nothing is kept alive.
    assert memo(group) is None


def test_a_member_by_itself_and_twice(group):
    x, expected = inputs(), group[0].joint(inputs())[..., 20:30]
    assert products(lambda: [group[1](x), group[1](x)]) == 4
    assert torch.equal(group[1](x), expected)


def test_another_input_of_equal_values_is_not_taken_for_the_first(group):
    x = inputs()
    assert products(lambda: [group[0](x), group[1](x.clone()), group[2](x)]) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda x, joint: x.mul_(2),
        lambda x, joint: joint.factor_a.weight.mul_(2),
        lambda x, joint: joint.factor_b.bias.add_(1),
        lambda x, joint: setattr(joint.factor_b, "weight", nn.Parameter(joint.factor_b.weight * 2)),
        lambda x, joint: setattr(joint, "factor_a", copy.deepcopy(joint.factor_a).requires_grad_(False)),
        lambda x, joint: joint.load_state_dict({k: v * 2 for k, v in joint.state_dict().items()}),
    ],
    ids=["input", "weight", "bias", "replaced weight", "replaced factor", "loaded"],
)
def test_changes_between_the_calls_are_seen(group, change):
    x = inputs()
    with torch.no_grad():
        group[0](x)
        change(x, group[0].joint)
        assert torch.equal(group[1](x), group[0].joint(x)[..., 20:30])


def test_modes_between_the_calls_are_seen(group):
    x = inputs()
    with torch.no_grad():
        group[0](x)
    assert group[1](x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert group[2](x).dtype == torch.bfloat16
    assert group[0](x).dtype == torch.float32
    with torch.inference_mode():
        assert group[1](x).is_inference() and group[2](x.clone()).is_inference()
    group[0](x).sum().backward()


def test_threads_with_inputs_of_their_own(group):
    expected = {seed: group[0].joint(inputs() + seed).detach() for seed in range(4)}
    wrong = []

    def work(seed):
        with torch.no_grad():
            for _ in range(200):
                x = inputs() + seed
                if not torch.equal(call_all(group, x), expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda group: pickle.loads(pickle.dumps(group))])
def test_a_copy_in_the_middle_of_a_call_stands_by_itself(group, copied):
    x = inputs()
    with torch.no_grad():
        group[0](x)
        other = copied(group)
        assert memo(other) is None
        assert all(layer.factored is other[0].joint for layer in other)
        other[0].joint.factor_a.weight.zero_()
        assert not torch.equal(call_all(other, x), call_all(group, x))
        assert torch.equal(call_all(group, x), group[0].joint(x))
    alone = copied(group[2])
    assert torch.equal(alone(x), group[2](x))


def test_casts(group):
    x = inputs(dtype=torch.float64)
    expected = call_all(group, inputs())
    group.double()
    torch.testing.assert_close(call_all(group, x), expected.double(), rtol=1e-5, atol=1e-5)
    group.half()
    assert {tensor.dtype for tensor in group.state_dict().values()} == {torch.float16}
    group.to("meta")
    assert call_all(group, x.half().to("meta")).shape == (4, 5, 50)


def test_gradients_are_those_of_the_joint_layer(group):
    whole, x = copy.deepcopy(group[0].joint), inputs()
    (call_all(group, x) ** 2).sum().backward()
    (whole(x) ** 2).sum().backward()
    for (name, found), expected in zip(group[0].joint.named_parameters(), whole.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)
    optimizer = torch.optim.SGD(group.parameters(), lr=1e-3)
    optimizer.step()
    assert torch.equal(call_all(group, x), group[0].joint(x))
    assert not torch.equal(call_all(group, x), whole(x))


def test_sizes_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"Layers with \[20, 20\] outputs do not make up one with 50"):
        share(joint(), (20, 20), MEMBERS[:2])
    assert member_sizes(25, SIZES) == [10, 5, 10]
    with pytest.raises(ValueError, match=r"24 outputs cannot be divided in the proportion of \[20, 10, 20\]"):
        member_sizes(24, SIZES)


def test_the_entry_names_the_members_and_the_first_the_pivots(group, layout):
    entries = [layer.entry for layer in group]
    assert {entry.members for entry in entries} == {MEMBERS}
    assert [entry.pivots is None for entry in entries] == [layout != "pivoted", True, True]
    assert "shared by query, key, value" in repr(group[1])


def shared(model):
    return [module for module in model.modules() if isinstance(module, SharedLinear)]


def test_gradient_checkpointing_gives_the_same_gradients(layout):
    plain = mixed(tiny_vit(), layout).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model(pixel_values=pixels(), labels=torch.arange(4)).loss.backward()
    for (name, found), expected in zip(saving.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_compiled_in_one_graph_with_two_products_for_a_group(layout):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    model = mixed(tiny_vit(), layout).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels()).logits
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=pixels()).logits, expected, rtol=1e-5, atol=1e-5)
        # A second call with other images and changed weights.
        for layer in shared(model):
            layer.bias.mul_(0.5)
        torch.testing.assert_close(
            compiled(pixel_values=pixels(seed=1)).logits, model(pixel_values=pixels(seed=1)).logits
        )
    linear = sum("linear" in str(node.target) for node in graphs[0].graph.nodes)
    # In each block q, k and v take two products, the output one, the MLP two when dense and four when factored.
    assert linear == (2 + 1 + 2) + (2 + 1 + 4) + 1


def test_exported_with_two_products_for_a_group(layout):
    model = mixed(tiny_vit(), layout).eval()
    program = torch.export.export(model, (), {"pixel_values": pixels()})
    linear = sum("linear" in str(node.target) for node in program.graph.nodes)
    assert linear == (2 + 1 + 2) + (2 + 1 + 4) + 1
    with torch.no_grad():
        expected = model(pixel_values=pixels(seed=1)).logits
        torch.testing.assert_close(program.module()(pixel_values=pixels(seed=1)).logits, expected)
    assert all(layer.holder._memo.result is None for layer in shared(model))
