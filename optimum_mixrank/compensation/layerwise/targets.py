"""The target of each layer of a segment: its output in the original model, or the original residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..segments import Call, SegmentRecord, SegmentReplay, first_tensor, run_segment


class OriginalOutputs:
    """What the original model computes for every batch, cached for as many batches as fit.

    Args:
        replay: Replay of the original model.
        names: Names of the layers within its segment.
        writes: See `Structure`; also an attribute.
        max_bytes: How much to cache.

    Attributes:
        results: What the segment itself returned, by batch, where that is a single tensor, which is a target anyway.
    """

    def __init__(self, replay: SegmentReplay, names: Sequence[str], writes: Mapping[str, str], max_bytes: int) -> None:
        self._replay = replay
        self.writes = writes
        self._cached: list[dict[str, Tensor]] = []
        self.results: dict[int, Any] = {}
        room = max_bytes
        for index, call in enumerate(replay.calls):
            outputs, record = _original_outputs(replay.segment, call, names, writes)
            room -= sum(tensor.numel() * tensor.element_size() for tensor in outputs.values())
            if room < 0:
                break
            self._cached.append(outputs)
            result = record.outputs.get("")
            if isinstance(result, Tensor) or (isinstance(result, tuple) and len(result) == 1):
                self.results[index] = result

    def of(self, index: int, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return what the original computes for the batch with this index, by layer."""
        if index < len(self._cached):
            return self._cached[index]
        writes = {name: place for name, place in self.writes.items() if name in names}
        return _original_outputs(self._replay.segment, self._replay.calls[index], names, writes)[0]


def _original_outputs(
    segment: nn.Module, call: Call, names: Sequence[str], writes: Mapping[str, str]
) -> tuple[dict[str, Tensor], SegmentRecord]:
    """Return the output of each layer, or the residual stream after it if it writes to that; and the whole record."""
    modules = sorted({place for place in writes.values() if place})
    outputs = [name for name in names if name not in writes] + ([""] if "" in writes.values() else [])
    record = run_segment(segment, call, modules, outputs)
    return {name: _stream(writes[name], record) if name in writes else record.outputs[name] for name in names}, record


def inputs_and_targets(
    segment: nn.Module, call: Call, names: Sequence[str], writes: Mapping[str, str], original: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs of layers of a segment of the compressed model, and the targets of their outputs, for one batch.

    `writes` is that of `Structure`, and `original` what `OriginalOutputs` returns for the batch.
    """
    places = {name: writes[name] for name in names if name in writes}
    modules = sorted({place for place in places.values() if place})
    outputs = [*places, *([""] if "" in places.values() else [])]
    record = run_segment(segment, call, [*names, *modules], outputs)
    targets = {name: original[name] for name in names}
    for name, place in places.items():
        # What the stream holds besides the layer's own output stays; the layer is to supply the rest.
        targets[name] = original[name] - (_stream(place, record) - record.outputs[name])
    return {name: record.inputs[name] for name in names}, targets


def _stream(place: str, record: SegmentRecord) -> Tensor:
    """Return the residual stream at a place that `find_residual_writes` gives."""
    return record.inputs[place] if place else first_tensor(record.outputs[place])
