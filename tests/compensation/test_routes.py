"""Which blocks can be replayed, and what is left out."""

import pytest
import torch
from compensation.cases import FAMILIES, images
from torch import nn

from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.routes import find_route
from optimum_mixrank.compensation.segments import SegmentReplay, find_segments


class Block(nn.Module):
    def __init__(self, width, out=None):
        super().__init__()
        self.linear = nn.Linear(width, out or width)

    def forward(self, hidden, memory=None):
        found = self.linear(hidden)
        return (found if memory is None else found + memory, None)


class TwoStacks(nn.Module):
    """An encoder and a decoder that looks at its result; between two blocks the width changes."""

    def __init__(self, every_output=False, twice=False):
        super().__init__()
        self.encoder = nn.ModuleList([Block(4), Block(4)])
        self.between = nn.Linear(4, 6)
        self.decoder = nn.ModuleList([Block(6), Block(6)])
        self.every_output, self.twice = every_output, twice
        self.device = torch.device("cpu")

    def forward(self, pixel_values):
        hidden, outputs = pixel_values, []
        for block in self.encoder:
            hidden = block(hidden)[0]
            outputs.append(hidden)
        memory = self.between(sum(outputs) if self.every_output else hidden)
        for block in self.decoder:
            hidden = block(memory, memory)[0]
            if self.twice:
                hidden = block(hidden, memory)[0]
            memory = memory + hidden
        return {"logits": memory}


def layers(model, *stacks):
    return [f"{stack}.{index}.linear" for stack in stacks for index in range(2)]


@pytest.mark.parametrize("every_output", [False, True])
@torch.no_grad()
def test_every_stack_is_replayed_by_itself(every_output):
    model = TwoStacks(every_output).eval()
    batch = torch.randn(3, 4)
    route = find_route(model, layers(model, "decoder", "encoder"), [batch])
    assert route.segments == ("encoder.0", "encoder.1", "decoder.0", "decoder.1")
    assert route.own_outputs == every_output and not route.left_out
    replay = SegmentReplay(model, route.segments, [batch], keep_results=True, own_outputs=route.own_outputs)
    expected = model(batch)["logits"]
    for _ in route.segments:
        assert torch.allclose(replay.outputs()[0].logits, expected)
        replay.advance()


def test_a_block_that_is_called_twice_is_left_out():
    model = TwoStacks(twice=True).eval()
    route = find_route(model, [*layers(model, "encoder", "decoder"), "between"], [torch.randn(3, 4)])
    assert route.segments == ("encoder.0", "encoder.1")
    assert route.left_out == {*layers(model, "decoder"), "between"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_is_one_chain(family):
    model = FAMILIES[family]().eval()
    names = [target.name for target in encoder_linears(model)]
    route = find_route(model, names, [images(3)])
    assert list(route.segments) == find_segments(model, names)
    assert not route.left_out and not route.own_outputs
