"""Where the output of a layer enters the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...runtime.hooks import hooks_removed_on_exit
from ..segments import Call, first_tensor


def find_residual_writes(segment: nn.Module, call: Call, names: Sequence[str]) -> dict[str, str]:
    """Places where the output of a layer has been added to the residual stream, unchanged and in its shape.

    Found by probing: the output of the layer is moved by a random `δ`. The first module thereafter whose input moves by
    exactly `δ`, but is not the output itself, is the place; or the segment's own output is.

    Args:
        segment: A segment of the original model.
        call: Arguments of one of its calls.
        names: Names of the layers within the segment.

    Returns:
        Place by layer: the name of the module whose input the stream then is, `""` for the segment's output. Layers
        whose output goes elsewhere (query, key, value, the first layer of an MLP) are left out.
    """
    before = _record(segment, call)
    writes = {}
    for name in names:
        noise: list[Tensor] = []
        own: list[Tensor] = []

        def move(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(output.shape, generator=generator).to(output)
            noise.append(drawn * output.std())  # noqa: B023 - called before the loop goes on
            own.append(output + noise[0])  # noqa: B023
            return own[0]  # noqa: B023

        handle = segment.get_submodule(name).register_forward_hook(move)
        with hooks_removed_on_exit([handle]):
            after = _record(segment, call)
        for place, tensor in after.items():
            if place not in before or tensor.shape != own[0].shape or torch.equal(tensor, own[0]):
                continue
            error = (tensor.float() - before[place].float() - noise[0].float()).norm()
            # The stream may be much larger than the output, and has then rounded the noise.
            rounding = torch.finfo(tensor.dtype).eps * tensor.float().norm()
            if error < 1e-3 * noise[0].float().norm() + 2 * rounding:
                writes[name] = place
                break
    return writes


@torch.no_grad()
def _record(segment: nn.Module, call: Call) -> dict[str, Tensor]:
    """First input of every submodule that is called once, in the order of calls, and the segment's output as `""`."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in segment.named_modules():
        if name:

            def hook(module: nn.Module, args: tuple[object, ...], name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    seen.setdefault(name, []).append(args[0])

            handles.append(module.register_forward_pre_hook(hook))
    with hooks_removed_on_exit(handles):
        output = first_tensor(call(segment))
    places = {name: tensors[0] for name, tensors in seen.items() if len(tensors) == 1}
    return {**places, "": output}
