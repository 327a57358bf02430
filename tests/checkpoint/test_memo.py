"""A pivoted layer keeps its reordered factor for inference, and never computes with one that is out of date."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from checkpoint.layers import inputs, pivoted
from torch import nn

from optimum_mixrank import PivotedLinear
from optimum_mixrank.checkpoint.memo import AffineMap, Memo


def layer_with_memo(**options):
    _, layer = pivoted(60, 36, 20, **options)
    with torch.no_grad():
        layer(inputs())
    assert layer.kept_tensors
    return layer


def exact(layer, x):
    """The outputs computed in float64 from the parameters alone."""
    return x.double() @ layer.product().T + layer.bias.double()


def assert_up_to_date(layer, dtype=torch.float32):
    x = inputs(dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            tolerance = 40 * torch.finfo(dtype).eps
            torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=tolerance, atol=tolerance)


def test_it_is_kept_between_passes_and_counted(monkeypatch):
    layer = layer_with_memo()
    assert [tuple(each.shape) for each in layer.kept_tensors] == [(60, 20), (60,)]
    assert "_memo" not in layer.state_dict() and len(list(layer.parameters())) == 5
    monkeypatch.setattr(layer, "_reordered", None)
    # Setting an attribute forgets it.
    assert not layer.kept_tensors
    monkeypatch.undo()
    assert_up_to_date(layer)
    monkeypatch.setitem(layer.__dict__, "_reordered", None)
    assert_up_to_date(layer)


def scaled(layer):
    with torch.no_grad():
        layer.factor_b.weight.mul_(2)


def loaded(layer, **options):
    layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()}, **options)


def optimized(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    layer(inputs()).square().sum().backward()
    optimizer.step()


def averaged(layer):
    # As averages of weights are copied: PyTorch does not count changes through `.data`.
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    layer.eval()


def merged(layer):
    factor = layer.factor_b
    layer.factor_b = nn.Sequential(factor)
    factor.weight.data += 1
    layer.factor_b = factor


CHANGES = {
    "in place": scaled,
    "bias in place": lambda layer: layer.factor_b.bias.detach().add_(1),
    "new bias": lambda layer: layer.set_bias(torch.ones(60)),
    "other data": lambda layer: setattr(layer.factor_b.weight, "data", layer.factor_b.weight.data + 1),
    "loaded": loaded,
    "assigned": lambda layer: loaded(layer, assign=True),
    "optimizer": optimized,
    "average": averaged,
    "merged": merged,
    "factor": lambda layer: setattr(layer, "factor_b", nn.Linear(20, 40)),
    "half and back": lambda layer: layer.half().float(),
    "factor half and back": lambda layer: layer.factor_b.half().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_layer_computes_with_what_it_holds(change):
    layer = layer_with_memo()
    change(layer)
    assert_up_to_date(layer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_steps_of_fused_optimizers_are_noticed_though_pytorch_does_not_count_them(kind):
    layer = layer_with_memo()
    optimizer = kind(layer.parameters(), lr=1e-2, fused=True)
    layer(inputs()).square().sum().backward()
    # With gradients, as before a step, nothing can be kept.
    assert_up_to_date(layer)
    assert not layer.kept_tensors
    optimizer.step()
    assert_up_to_date(layer)
    optimizer.zero_grad()
    assert_up_to_date(layer)
    assert layer.kept_tensors


def test_what_was_kept_before_there_were_gradients_is_not_used_with_them():
    layer = layer_with_memo()
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2, fused=True)
    assert_up_to_date(layer)
    optimizer.step()
    assert_up_to_date(layer)


def test_what_other_processes_may_change_is_not_kept():
    layer = layer_with_memo().share_memory()
    assert_up_to_date(layer)
    assert not layer.kept_tensors


@pytest.mark.parametrize("convert", [lambda layer: layer.half().float(), loaded], ids=["cast", "loaded"])
def test_contents_of_parameters_can_be_exchanged_after_inference(convert):
    before = torch.__future__.get_swap_module_params_on_conversion()
    layer = layer_with_memo()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        convert(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert_up_to_date(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_converted_layer_computes_in_its_new_dtype(dtype):
    layer = layer_with_memo().to(dtype)
    assert not layer.kept_tensors
    assert_up_to_date(layer, dtype)


def test_training_keeps_nothing_and_gets_gradients():
    layer = layer_with_memo().train()
    layer(inputs()).sum().backward()
    assert not layer.kept_tensors
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)
    # The mode does not matter, only whether gradients are needed.
    layer.eval()
    layer(inputs())
    assert not layer.kept_tensors


def test_frozen_layers_pass_gradients_on():
    layer = layer_with_memo().requires_grad_(False)
    x = inputs().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), layer.product().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_what_was_made_in_inference_mode_serves_training():
    _, layer = pivoted(60, 36, 20)
    with torch.inference_mode():
        expected = layer(inputs())
    assert layer.kept_tensors
    torch.testing.assert_close(layer(inputs()), expected.clone())
    layer.requires_grad_(False)
    layer(inputs().requires_grad_()).sum().backward()


def test_parameters_made_in_inference_mode_are_not_watched_and_nothing_is_kept():
    with torch.inference_mode():
        layer = PivotedLinear(36, 60, 20)
        layer(inputs())
    assert not layer.kept_tensors


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_start_with_nothing(copied):
    layer = layer_with_memo()
    other = copied(layer)
    assert layer.kept_tensors and not other.kept_tensors
    scaled(other)
    assert_up_to_date(other)
    assert_up_to_date(layer)


def test_saved_whole_it_takes_no_more_space():
    layer, sizes = layer_with_memo(), []
    for each in (layer, copy.deepcopy(layer)):
        buffer = io.BytesIO()
        torch.save(each, buffer)
        sizes.append(len(buffer.getvalue()))
    assert abs(sizes[0] - sizes[1]) < 1000


def test_it_goes_with_the_parameters_it_was_made_from():
    layer = layer_with_memo()
    gc.disable()
    try:
        kept = weakref.ref(layer.kept_tensors[0])
        layer.factor_b._parameters["weight"] = None
        assert kept() is None
        layer = layer_with_memo()
        kept = weakref.ref(layer.kept_tensors[0])
        del layer
        assert kept() is None
    finally:
        gc.enable()


def test_nothing_is_kept_of_traces():
    memo, parameter = Memo(), nn.Parameter(torch.zeros(2))

    class Traced(torch.Tensor):
        pass

    for weight in (torch.zeros(2, device="meta"), torch.zeros(2).as_subclass(Traced)):
        memo.get([parameter], lambda weight=weight: AffineMap(weight, None))
        assert not memo.tensors


def test_compilation_and_export_after_inference():
    layer = layer_with_memo().eval()
    x = inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        scaled(layer)
        torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    # Among the constants of the graph is the order, and not what was kept.
    assert [tensor.dtype for tensor in exported.constants.values()] == [torch.int64]
