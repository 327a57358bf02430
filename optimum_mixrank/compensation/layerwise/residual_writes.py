"""Find where the output of a layer enters the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...runtime.hooks import hooks_removed_on_exit
from ..segments import Call, record_calls


def find_residual_writes(segment: nn.Module, call: Call, names: Sequence[str]) -> dict[str, str]:
    """Find places where the output of a layer has been added to the residual stream, unchanged and in its own shape.

    They are found by probing, with one call of a segment of the original model: the output of the layer is changed by a
    random `δ`. The place is the first module afterwards whose input changes by exactly `δ` without being that output
    itself, or else the segment's own output. Layers and places are given by their names within the segment.

    Returns:
        The place for each layer: the name of the module whose input is the stream, or `""` for the segment's output.
        Layers whose output goes elsewhere (query, key, value, the first layer of an MLP) are left out.
    """
    before = _record(segment, call)
    writes = {}
    for name in names:
        noise: list[Tensor] = []
        own: list[Tensor] = []

        def perturb(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(output.shape, generator=generator).to(output)
            # A layer of zeros, as some are at first, has an output without spread.
            noise.append(drawn * (output.std() or 1.0))  # noqa: B023 - called before the loop goes on
            own.append(output + noise[0])  # noqa: B023
            return own[0]  # noqa: B023

        handle = segment.get_submodule(name).register_forward_hook(perturb)
        with hooks_removed_on_exit([handle]):
            after = _record(segment, call)
        for place, tensor in after.items():
            if place not in before or tensor.shape != own[0].shape or torch.equal(tensor, own[0]):
                continue
            error = (tensor.float() - before[place].float() - noise[0].float()).norm()
            # The stream may be much larger than the noise, which is then rounded when it is added.
            rounding = torch.finfo(tensor.dtype).eps * tensor.float().norm()
            if error < 1e-3 * noise[0].float().norm() + 2 * rounding:
                writes[name] = place
                break
    return writes


def _record(segment: nn.Module, call: Call) -> dict[str, Tensor]:
    """Return the first input of every submodule that is called once, in order, and the segment's output as `""`."""
    calls, output = record_calls(segment, call)
    counts = Counter(name for name, _ in calls)
    return {**{name: tensor for name, tensor in calls if counts[name] == 1}, "": output}
