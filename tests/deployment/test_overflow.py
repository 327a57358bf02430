import copy

import torch
from models import mixed, pixels, tiny_vit

from optimum_mixrank import FactoredLinear
from optimum_mixrank.deployment.overflow import find_largest_activation, find_overflow


def test_the_first_layer_that_overflows_is_named():
    model = mixed(tiny_vit(), "pivoted").eval()
    assert find_overflow(copy.deepcopy(model).half(), pixels().half()) is None
    name, layer = next((name, each) for name, each in model.named_modules() if isinstance(each, FactoredLinear))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1e4)
    largest = find_largest_activation(model, pixels())
    assert largest.value > 65504
    found = find_overflow(copy.deepcopy(model).half(), pixels().half())
    assert found.startswith("in `") and name in found


def test_what_is_between_layers_is_named_by_the_next_layer():
    class Between(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, pixel_values):
            return self.second(self.first(pixel_values) * 1e5)

    assert find_overflow(Between(), pixels().half()) == "before `second`"


def test_no_hook_is_left():
    model = tiny_vit().train()
    find_largest_activation(model, pixels())
    assert model.training and not any(module._forward_hooks for module in model.modules())
