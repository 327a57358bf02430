"""What the layers of a segment are to give: outputs of the original model, or its residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..segments import Call, SegmentReplay, SegmentRun, run_segment


class OriginalOutputs:
    """What the original gives for every batch: kept for as many batches as fit, computed again each time for others.

    Args:
        replay: Of the original model.
        names: Of the layers within its segment.
        writes: See `Structure`.
        max_bytes: Up to which outputs are kept.

    Attributes:
        results: What the segment itself returned, by batch, where that is one tensor, which is kept as a target anyway.
    """

    def __init__(self, replay: SegmentReplay, names: Sequence[str], writes: Mapping[str, str], max_bytes: int) -> None:
        self._replay = replay
        self._writes = writes
        self._kept: list[dict[str, Tensor]] = []
        self.results: dict[int, Any] = {}
        room = max_bytes
        for index, call in enumerate(replay.calls):
            found, run = _wanted(replay.segment, call, names, writes)
            room -= sum(tensor.numel() * tensor.element_size() for tensor in found.values())
            if room < 0:
                break
            self._kept.append(found)
            if isinstance(run.result, Tensor) or (isinstance(run.result, tuple) and len(run.result) == 1):
                self.results[index] = run.result

    def of(self, index: int, names: Sequence[str]) -> Mapping[str, Tensor]:
        """By layer, for the batch with this index."""
        if index < len(self._kept):
            return self._kept[index]
        writes = {name: place for name, place in self._writes.items() if name in names}
        return _wanted(self._replay.segment, self._replay.calls[index], names, writes)[0]


def _wanted(
    segment: nn.Module, call: Call, names: Sequence[str], writes: Mapping[str, str]
) -> tuple[dict[str, Tensor], SegmentRun]:
    """What the original gives for one batch, by layer, and the run.

    That is its output, or the residual stream at the place where the layer writes to it.
    """
    modules = sorted({place for place in writes.values() if place})
    outputs = [name for name in names if name not in writes] + ([""] if "" in writes.values() else [])
    run = run_segment(segment, call, modules, outputs)
    wanted = {
        name: _at(writes[name], run.inputs, run.outputs) if name in writes else run.outputs[name] for name in names
    }
    return wanted, run


def inputs_and_targets(
    segment: nn.Module, call: Call, names: Sequence[str], writes: Mapping[str, str], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the compressed model's layers, and what their outputs should be, for one batch.

    Args:
        segment: Of the compressed model.
        call: Its arguments.
        names: Of the layers within it.
        writes: See `Structure`.
        wanted: What `OriginalOutputs` gives for the batch.
    """
    places = {name: writes[name] for name in names if name in writes}
    modules = sorted({place for place in places.values() if place})
    outputs = [*places, *([""] if "" in places.values() else [])]
    run = run_segment(segment, call, [*names, *modules], outputs)
    streams, given = run.inputs, run.outputs
    # What the stream holds beside the layer's own output stays; the layer is to add the rest.
    targets = {
        name: wanted[name] - (_at(places[name], streams, given) - given[name]) if name in places else wanted[name]
        for name in names
    }
    return {name: streams[name] for name in names}, targets


def _at(place: str, streams: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
    """The residual stream at the input of a module, or as the output of the segment."""
    return streams[place] if place else given[place]
