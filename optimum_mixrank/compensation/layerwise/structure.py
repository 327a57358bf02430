"""How the layers of a segment hang together: which share an input, and which write to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...runtime.hooks import hooks_removed_on_exit
from ..segments import Call
from .residual_writes import find_residual_writes


@dataclass(frozen=True)
class Structure:
    """The layers of a segment.

    Attributes:
        groups: Names in the order of calls, those that share an input together.
        writes: By name of a layer that writes to the residual stream, the place where the stream then is; see
            `find_residual_writes`.
    """

    groups: Sequence[Sequence[str]]
    writes: Mapping[str, str]

    @classmethod
    def of(cls, segment: nn.Module, call: Call, names: Sequence[str], residual_targets: bool) -> Structure:
        """Look at one call of a segment.

        Args:
            segment: Of the original model.
            call: Its arguments.
            names: Of the layers within it.
            residual_targets: Whether to look for what is written to the residual stream.
        """
        writes = find_residual_writes(segment, call, names) if residual_targets else {}
        return cls(group_by_input(segment, call, names), writes)


def group_by_input(segment: nn.Module, call: Call, names: Sequence[str]) -> list[list[str]]:
    """Layers of a segment in the order in which they are called, those that get the very same tensor together.

    Raises:
        ValueError: if a layer is called more than once, or not at all.
    """
    calls: list[tuple[str, Tensor]] = []
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            calls.append((name, args[0]))

        handles.append(segment.get_submodule(name).register_forward_pre_hook(hook))
    with hooks_removed_on_exit(handles), torch.no_grad():
        call(segment)
    called = [name for name, _ in calls]
    for name in names:
        if called.count(name) != 1:
            raise ValueError(
                f"Layer {name!r} is called {called.count(name)} times in a forward pass, so it cannot be solved in "
                "sequence. Leave it out with exclude_modules, or leave layer-wise steps out of compensation."
            )
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, tensor in calls:
        if tensor is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = tensor
    return groups
