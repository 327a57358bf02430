"""How the layers of a segment are connected: which share an input, and which write to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...runtime.hooks import group_by_tensor
from ..segments import Call, record_calls
from .residual_writes import find_residual_writes


@dataclass(frozen=True)
class Structure:
    """Groups of layers of a segment that share an input, in the order of their calls, and residual writes.

    `writes` gives the place of the residual stream after each layer that writes to it; see `find_residual_writes`.
    """

    groups: Sequence[Sequence[str]]
    writes: Mapping[str, str]

    @classmethod
    def of(cls, segment: nn.Module, call: Call, names: Sequence[str], residual_targets: bool) -> Structure:
        """Determine the structure of a segment of the original model from one call, with its layers given by name.

        `writes` stays empty unless `residual_targets` is set.
        """
        writes = find_residual_writes(segment, call, names) if residual_targets else {}
        return cls(group_by_input(segment, call, names), writes)


def group_by_input(segment: nn.Module, call: Call, names: Sequence[str]) -> list[list[str]]:
    """Return the layers of a segment in the order of their calls; those called with the very same tensor form a group.

    Raises:
        ValueError: if a layer is called more than once, or not at all.
    """
    calls = [(name, tensor) for name, tensor in record_calls(segment, call)[0] if name in names]
    called = [name for name, _ in calls]
    for name in names:
        if called.count(name) != 1:
            raise ValueError(
                f"Layer {name!r} is called {called.count(name)} times in a forward pass, so it cannot be solved in "
                "sequence. Leave it out with exclude_modules, or leave layer-wise steps out of compensation."
            )
    return group_by_tensor(calls)
