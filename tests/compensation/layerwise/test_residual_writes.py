"""Which layers write to the residual stream."""

import pytest
import torch
from compensation.cases import FAMILIES, images, layers_inside, segments_of

from optimum_mixrank.compensation.layerwise.residual_writes import find_residual_writes
from optimum_mixrank.compensation.segments import Call, SegmentReplay


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_that_write_to_the_residual_stream_are_found(family):
    model = FAMILIES[family]().eval()
    segments = segments_of(model)
    replay = SegmentReplay(model, segments, [images(3)])
    inside = layers_inside(model, segments[0])
    writing = set(find_residual_writes(replay.segment, replay.calls[0], inside))
    # The second layer of every MLP does; query, key, value and the first layer never do.
    second = {
        name for name in inside if name.endswith("fc2") or (name.endswith("output.dense") and "attention" not in name)
    }
    assert second and second <= writing
    elsewhere = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "fc1")
    assert not any(name.endswith(elsewhere) for name in writing)
    if family != "swin":
        assert len(writing) == 2


class Block(torch.nn.Module):
    """Two layers, the second of which writes to the stream, which a third one then reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = x + self.second(self.first(x).relu())
        return (x + self.third(x),)


def test_places_are_the_next_module_that_reads_the_stream_or_the_output():
    torch.manual_seed(0)
    writes = find_residual_writes(Block().eval(), Call((torch.randn(2, 5, 8),), {}), ["first", "second", "third"])
    assert writes == {"second": "third", "third": ""}
