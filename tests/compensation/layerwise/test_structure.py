"""Which layers of a segment share an input."""

import pytest
import torch
from compensation.cases import FAMILIES, images, layers_inside, segments_of

from optimum_mixrank.compensation.layerwise.structure import Structure, group_by_input
from optimum_mixrank.compensation.segments import Call, SegmentReplay


@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_and_value_form_a_group(family):
    model = FAMILIES[family]().eval()
    segments = segments_of(model)
    with torch.no_grad():
        replay = SegmentReplay(model, segments, [images(3)])
    inside = layers_inside(model, segments[0])
    groups = group_by_input(replay.segment, replay.calls[0], inside)
    assert sorted(name for group in groups for name in group) == sorted(inside)
    assert [len(group) for group in groups][:4] == [3, 1, 1, 1]
    structure = Structure.of(replay.segment, replay.calls[0], inside, residual_targets=False)
    assert structure.groups == groups and not structure.writes


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_is_not_called_once_is_refused(times):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(times):
                x = self.linear(x)
            return x

    with pytest.raises(ValueError, match=f"'linear' is called {times} times"):
        group_by_input(Block(), Call((torch.zeros(1, 4),), {}), ["linear"])
