"""Replay segment by segment is the model itself."""

import pytest
import torch
from compensation.cases import FAMILIES, images

from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.layerwise.compensator import group_by_input
from optimum_mixrank.compensation.layerwise.residual_writes import find_residual_writes
from optimum_mixrank.compensation.segments import Call, SegmentReplay, find_segments, first_tensor, run_segment


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]().eval()


def names(model):
    return [target.name for target in encoder_linears(model)]


def kind(name):
    return name.rpartition(".")[2]


@pytest.mark.parametrize("given", [[], [0]], ids=["run", "given"])
@torch.no_grad()
def test_inputs_of_every_segment_are_those_of_the_whole_model(model, given):
    segments = find_segments(model, names(model))
    assert len(segments) == 2
    batches = list(images(6).split(4))
    expected = {}
    for segment in segments:
        module = model.get_submodule(segment)
        handle = module.register_forward_pre_hook(
            lambda module, args, segment=segment: expected.setdefault(segment, []).append(args[0])
        )
        for batch in batches:
            model(pixel_values=batch)
        handle.remove()
    replay = SegmentReplay(model, segments, batches)
    for index, segment in enumerate(segments):
        assert replay.segment is model.get_submodule(segment)
        for call, inputs in zip(replay.calls, expected[segment], strict=True):
            assert torch.equal(call.args[0], inputs)
        known = {batch: replay.calls[batch](replay.segment) for batch in given}
        ran = []
        inner = next(module for module in replay.segment.modules() if isinstance(module, torch.nn.Linear))
        handle = inner.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        is_last = index + 1 == len(segments)
        assert replay.advance(known) == (not is_last)
        handle.remove()
        assert len(ran) == (0 if is_last else len(batches) - len(given))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_outside_of_every_stack(model):
    with pytest.raises(ValueError, match="'classifier' lies in no stack of blocks"):
        find_segments(model, ["classifier"])


@torch.no_grad()
def test_run_segment_takes_what_was_asked_for(model):
    segments = find_segments(model, names(model))
    replay = SegmentReplay(model, segments, [images(3)])
    call, segment = replay.calls[0], replay.segment
    inside = [name.removeprefix(f"{segments[0]}.") for name in names(model) if name.startswith(segments[0])]
    run = run_segment(segment, call, inside, [*inside, ""])
    inputs, outputs = run.inputs, run.outputs
    assert torch.equal(outputs[""], first_tensor(call(segment)))
    assert type(run.result) is type(call(segment)) and first_tensor(run.result) is outputs[""]
    for name in inside:
        assert torch.equal(segment.get_submodule(name)(inputs[name]), outputs[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in segment.modules())


@torch.no_grad()
def test_query_key_and_value_form_a_group(model):
    segments = find_segments(model, names(model))
    replay = SegmentReplay(model, segments, [images(3)])
    inside = [name.removeprefix(f"{segments[0]}.") for name in names(model) if name.startswith(segments[0])]
    groups = group_by_input(replay.segment, replay.calls[0], inside)
    assert sorted(name for group in groups for name in group) == sorted(inside)
    assert [len(group) for group in groups][:4] == [3, 1, 1, 1]


@torch.no_grad()
def test_layers_that_write_to_the_residual_stream_are_found(model):
    segments = find_segments(model, names(model))
    replay = SegmentReplay(model, segments, [images(3)])
    inside = [name.removeprefix(f"{segments[0]}.") for name in names(model) if name.startswith(segments[0])]
    anchors = find_residual_writes(replay.segment, replay.calls[0], inside)
    found = set(anchors)
    # The second layer of every MLP is; query, key, value and the first layer never are.
    mlp_outputs = [name for name in inside if kind(name) == "fc2" or name.endswith("output.dense")]
    mlp_outputs = [name for name in mlp_outputs if "attention" not in name]
    assert set(mlp_outputs) <= found and mlp_outputs
    assert not any(kind(name) in ("query", "key", "value", "q_proj", "k_proj", "v_proj", "fc1") for name in found)
    if model.config.model_type != "swin":
        assert len(found) == 2


def test_a_layer_that_runs_twice_is_refused():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(x))

    with pytest.raises(ValueError, match="'linear' is called 2 times"):
        group_by_input(Twice(), Call((torch.zeros(1, 4),), {}), ["linear"])


@torch.no_grad()
def test_a_forward_that_somebody_has_put_on_a_block_comes_back():
    model = FAMILIES["vit"]().eval()
    segments = find_segments(model, names(model))
    block = model.get_submodule(segments[0])
    patched = block.forward
    block.forward = patched
    replay = SegmentReplay(model, segments, [images(2)])
    replay.advance()
    assert vars(block)["forward"] is patched
    assert "forward" not in vars(model.get_submodule(segments[1]))
