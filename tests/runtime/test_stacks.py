"""What is a stack of blocks, and in which blocks a layer is."""

import pytest
from torch import nn

from optimum_mixrank.runtime.stacks import blocks_around, is_stack


def block():
    return nn.Sequential(nn.Linear(2, 2), nn.GELU())


class Model(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = stages


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ModuleList([nn.Linear(2, 2)]), True),
        (nn.Sequential(block(), block()), True),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), False),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.GELU()), False),
    ],
    ids=["list", "blocks", "layers", "convolutions"],
)
def test_is_stack(module, expected):
    assert is_stack(module) == expected


@pytest.mark.parametrize(
    ("stages", "name", "expected"),
    [
        (nn.ModuleList([block()]), "stages.0.0", ["stages.0"]),
        (nn.ModuleList([nn.ModuleList([block()])]), "stages.0.0.0", ["stages.0.0"]),
        (nn.Sequential(nn.Sequential(block(), block())), "stages.0.1.0", ["stages.0", "stages.0.1"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "stages.0", []),
    ],
    ids=["list", "list of lists", "sequential", "head"],
)
def test_blocks_are_called(stages, name, expected):
    assert blocks_around(Model(stages), name) == expected
