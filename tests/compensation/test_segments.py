"""Replaying a model segment by segment gives what the model itself computes."""

import pytest
import torch
from compensation.cases import FAMILIES, images, layers_inside, segments_of

from optimum_mixrank.compensation.segments import SegmentReplay, find_segments, first_tensor, record_calls, run_segment
from optimum_mixrank.runtime.inputs import ModelInputs


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]().eval()


@pytest.mark.parametrize("given", [[], [0]], ids=["run", "given"])
@torch.no_grad()
def test_inputs_of_every_segment_are_those_of_the_whole_model(model, given):
    segments = segments_of(model)
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


def test_a_layer_outside_of_every_stack_of_blocks_is_refused(model):
    with pytest.raises(ValueError, match="'classifier' lies in no stack of blocks"):
        find_segments(model, ["classifier"])


@torch.no_grad()
def test_run_segment_records_what_was_asked_for(model):
    segments = segments_of(model)
    replay = SegmentReplay(model, segments, [images(3)])
    call, segment = replay.calls[0], replay.segment
    inside = layers_inside(model, segments[0])
    record = run_segment(segment, call, inside, [*inside, ""])
    expected = call(segment)
    assert type(record.outputs[""]) is type(expected)
    assert torch.equal(first_tensor(record.outputs[""]), first_tensor(expected))
    for name in inside:
        assert torch.equal(segment.get_submodule(name)(record.inputs[name]), record.outputs[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in segment.modules())


@torch.no_grad()
def test_run_segment_stops_as_soon_as_everything_is_recorded(model):
    segments = segments_of(model)
    replay = SegmentReplay(model, segments, [images(3)])
    first, *_, last = layers_inside(model, segments[0])
    called = []
    handle = replay.segment.get_submodule(last).register_forward_pre_hook(lambda *_: called.append(1))
    run_segment(replay.segment, replay.calls[0], [first])
    handle.remove()
    assert not called


@torch.no_grad()
def test_calls_are_recorded_in_their_order(model):
    segments = segments_of(model)
    replay = SegmentReplay(model, segments, [images(3)])
    inside = layers_inside(model, segments[0])
    calls, output = record_calls(replay.segment, replay.calls[0])
    called = []
    handles = [
        replay.segment.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in inside
    ]
    assert torch.equal(output, first_tensor(replay.calls[0](replay.segment)))
    for handle in handles:
        handle.remove()
    # Releases of Transformers call query, key and value in different orders.
    assert [name for name, _ in calls if name in inside] == called and sorted(called) == sorted(inside)
    assert not any(module._forward_pre_hooks for module in replay.segment.modules())


@torch.no_grad()
def test_an_overridden_forward_of_a_block_is_restored():
    model = FAMILIES["vit"]().eval()
    segments = segments_of(model)
    block = model.get_submodule(segments[0])
    overridden = block.forward
    block.forward = overridden
    replay = SegmentReplay(model, segments, [images(2)])
    replay.advance()
    assert vars(block)["forward"] is overridden
    assert "forward" not in vars(model.get_submodule(segments[1]))


def test_forwards_that_a_model_replaces_while_it_runs_are_restored(monkeypatch):
    """As models of Transformers 4.57 do to record outputs, of which a pass that is left early restores nothing."""
    model = FAMILIES["vit"]().eval()
    block = model.get_submodule(segments_of(model)[0])
    original = type(model).forward

    def recording(self, *args, **kwargs):
        inner = block.forward
        block.forward = lambda *inputs, **options: inner(*inputs, **options)
        result = original(self, *args, **kwargs)
        del block.forward
        return result

    monkeypatch.setattr(type(model), "forward", recording)
    replay = SegmentReplay(model, segments_of(model), [ModelInputs(images(2))])
    assert replay.advance() and not any("forward" in vars(module) for module in model.modules())
