"""Layers that share their first factor compute what the dense ones would, in two products for all of them."""

import copy
import pickle
import threading

import pytest
import torch
from checkpoint.mixed import mixed_model
from models import pixels
from torch import nn
from transformers import AutoModelForImageClassification

from optimum_mixrank import LowRankLinear, PivotedLinear
from optimum_mixrank.checkpoint.modeling import replace_module
from optimum_mixrank.checkpoint.shared import SharedLinear, share


NAMES = ("attention.query", "attention.key", "attention.value")
SIZES = (6, 5, 7)
LAYOUTS = pytest.mark.parametrize("layout", ["factors", "pivoted"])


class Attention(nn.Module):
    def __init__(self, layout="factors"):
        super().__init__()
        torch.manual_seed(0)
        joint = {
            "factors": lambda: LowRankLinear(10, 18, 4),
            "pivoted": lambda: PivotedLinear(10, 18, 4, pivots=[0, 7, 8, 17]),
        }
        self.query, self.key, self.value = share(joint[layout](), SIZES, NAMES)
        self.calls = 0
        self.query.joint.factor_a.register_forward_hook(self.count)

    def count(self, *args):
        self.calls += 1

    def forward(self, x):
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)


@LAYOUTS
def test_each_returns_its_rows(layout):
    model, x = Attention(layout), torch.randn(3, 10)
    expected = model.query.joint(x)
    assert torch.equal(model(x), expected)
    for layer, rows in zip((model.query, model.key, model.value), expected.split(SIZES, dim=-1), strict=True):
        torch.testing.assert_close(layer.to_linear()(x), rows)
        torch.testing.assert_close(x.double() @ layer.product().T + layer.bias.double(), rows.double())
    assert sum(layer.num_values for layer in (model.query, model.key, model.value)) == model.query.joint.num_values


def test_the_joint_outputs_are_computed_once_and_not_kept():
    model, x = Attention(), torch.randn(3, 10)
    model(x)
    assert model.calls == 1
    assert model.query._memo.result is None
    model.value(x)
    model.query(x)
    assert model.calls == 2


@pytest.mark.parametrize("change", ["input", "in place", "weight", "new weight", "grad", "autocast", "again"])
def test_what_has_changed_is_computed_again(change):
    model, x = Attention(), torch.randn(3, 10)
    model.query(x)
    if change == "input":
        x = x.clone()
    elif change == "in place":
        x.mul_(2)
    elif change == "weight":
        with torch.no_grad():
            model.query.joint.factor_b.weight.mul_(2)
    elif change == "new weight":
        model.query.joint.factor_b.weight = nn.Parameter(torch.randn(18, 4))
    with torch.set_grad_enabled(change != "grad"), torch.autocast("cpu", enabled=change == "autocast"):
        layer = model.query if change == "again" else model.key
        found = layer(x)
        assert torch.equal(found, model.query.joint(x)[..., layer.rows])
        assert found.requires_grad == (change != "grad")


def test_shapes_are_found_on_the_meta_device():
    assert Attention().to("meta")(torch.randn(3, 10, device="meta")).shape == (3, 18)


def test_threads_with_inputs_of_their_own_get_their_own_outputs():
    model = Attention()
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(3, 10, generator=generator)
            if not torch.equal(model(x), model.query.joint(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(copied):
    model, x = Attention(), torch.randn(3, 10)
    model.query(x)
    other = copied(model)
    assert other.key.holder is other.value.holder is other.query
    assert other.query._memo.result is None
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        other.query.joint.factor_b.weight.zero_()
        other.query.joint.factor_b.bias.zero_()
    assert not other(x).any()
    assert model(x).any()


def test_compilation_and_export_keep_two_products():
    model, x = Attention().eval(), torch.randn(3, 10)
    expected, products = model(x), []
    del model.query.joint.factor_a._forward_hooks[next(iter(model.query.joint.factor_a._forward_hooks))]

    def backend(module, inputs):
        products.append(sum("linear" in str(node.target) for node in module.graph.nodes))
        return module

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    assert products == [2]
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert sum("linear" in str(node.target) for node in exported.graph.nodes) == 2
    assert str(torch.jit.trace(model, x).inlined_graph).count("aten::linear") == 2


def test_data_parallel_copies_are_refused():
    with pytest.raises(NotImplementedError, match="torchrun"):
        Attention().key._replicate_for_data_parallel()


def test_sizes_have_to_add_up():
    with pytest.raises(ValueError, match=r"\[6, 5\] outputs do not make up one with 18"):
        share(LowRankLinear(10, 18, 4), [6, 5], ["query", "key"])


@LAYOUTS
def test_offloaded_to_disk_they_still_take_two_products(layout, tmp_path):
    model, _ = mixed_model(layout)
    model.save_pretrained(tmp_path / "model")
    devices = {**dict.fromkeys(dict(model.named_children()), "disk"), "classifier": "cpu"}
    offloaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload"
    )
    holders = [each for each in offloaded.modules() if isinstance(each, SharedLinear) and each.position == 0]
    calls = []
    for holder in holders:
        holder.joint.factor_a.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        assert torch.equal(offloaded(pixels()).logits, model(pixels()).logits)
    assert len(calls) == len(holders) == 2
    assert all(holder._memo.result is None for holder in holders)


@LAYOUTS
@pytest.mark.parametrize("position", [0, 1])
def test_a_group_that_is_no_longer_whole_is_not_saved(layout, position, tmp_path):
    model, _ = mixed_model(layout)
    name, layer = next(
        (name, each)
        for name, each in model.named_modules()
        if isinstance(each, SharedLinear) and each.position == position
    )
    replace_module(model, name, layer.to_linear())
    with pytest.raises(ValueError, match=r"attention\.attention\.value shared a factor with layers that this ViT"):
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixels()).logits
        torch.testing.assert_close(model.dequantize()(pixels()).logits, expected, rtol=1e-4, atol=1e-4)
