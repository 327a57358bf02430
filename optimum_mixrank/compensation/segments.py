"""Run a model segment by segment over a fixed set of images, storing the activations at one boundary only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.forward import placement
from ..runtime.hooks import forwards_restored, hooks_removed_on_exit
from ..runtime.inputs import ModelInputs
from ..runtime.outputs import PLAIN_CALL, ModelCall, ModelOutput
from ..runtime.stacks import blocks_around


@dataclass
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        """Call a module with these arguments."""
        return module(*self.args, **self.kwargs)

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors among the arguments."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, however they are nested."""
        return tensors_in([*self.args, *self.kwargs.values()])


Keep = Callable[[int, Call], Call]
"""Takes the number of a batch and a call, and returns the call in the form in which it is stored."""


def in_memory(index: int, call: Call) -> Call:
    """Store a call as it is."""
    return call


class StopForward(Exception):  # noqa: N818 - no error, but the way out of a forward pass whose rest is not needed
    """Ends a forward pass as soon as everything needed has been recorded."""


def find_segments(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the segments of an encoder in the order of the modules: the blocks of ViT and DeiT, the stages of Swin.

    They are the outermost blocks around each of the layers, given by module name, that are called; see `blocks_around`.

    Raises:
        ValueError: if a layer is not inside any stack of blocks.
    """
    segments: dict[str, None] = {}
    for name in names:
        around = blocks_around(model, name)
        if not around:
            raise ValueError(f"Layer {name!r} lies in no stack of blocks (`nn.ModuleList`).")
        segments.setdefault(around[0])
    return list(segments)


class SegmentReplay:
    """The inputs of one segment after the other, for a fixed list of batches.

    To advance from one segment to the next, the model runs with all segments up to the current one replaced by the
    output of the last one in the same stack: whatever the model does between segments is done by its own code. A model
    that looks at the outputs of all segments, or changes their shape in between, needs each of them (`own_outputs`).

    Args:
        model: A model in evaluation mode.
        segments: Module names of the segments, in the order of their calls.
        batches: Inputs of the model; iterated over once per segment.
        keep: How calls are stored.
        call: How the model is called.
        keep_results: Whether to keep what the segments before the current one have returned, for `outputs`.
        own_outputs: Whether every segment is replaced by its own output, all of which are kept in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        segments: Sequence[str],
        batches: Iterable[ModelInputs],
        keep: Keep = in_memory,
        call: ModelCall = PLAIN_CALL,
        keep_results: bool = False,
        own_outputs: bool = False,
    ) -> None:
        self._model = model
        self._call = call
        self._segments = list(segments)
        # What a segment is replaced by is found under this name.
        self._keys = [name if own_outputs else name.rpartition(".")[0] for name in segments]
        self._keep_results = keep_results or len(set(self._keys)) > 1
        self._batches = batches
        self._placement = placement(model)
        self._position = 0
        self._keep = keep
        # What segments before the current one have returned, by index of the batch.
        self._results: dict[int, dict[str, Any]] = {}
        self.calls = [keep(index, self._capture(batch, 0, {})) for index, batch in enumerate(batches)]

    @property
    def segment(self) -> nn.Module:
        """The current segment, whose inputs are stored."""
        return self._model.get_submodule(self._segments[self._position])

    @property
    def num_bytes(self) -> int:
        """The bytes of the activations stored in memory."""
        return sum(call.num_bytes for call in self.calls)

    def advance(self, outputs: Mapping[int, Any] = MappingProxyType({})) -> bool:
        """Move on to the next segment, and return whether there is one.

        Args:
            outputs: Known outputs of the current segment, by index of the batch; it is run for the other batches.
        """
        if self._position + 1 == len(self._segments):
            return False
        for index, batch in enumerate(self._batches):
            output = outputs[index] if index in outputs else self.calls[index](self.segment)
            results = {**self._results.get(index, {}), self._keys[self._position]: output}
            if self._keep_results:
                self._results[index] = results
            self.calls[index] = self._keep(index, self._capture(batch, self._position + 1, results))
        self._position += 1
        return True

    @torch.no_grad()
    def outputs(self) -> list[ModelOutput]:
        """Return the model's outputs for all batches, computed from the current segment on, on the CPU.

        The replay must have been made with `keep_results`.
        """
        found = []
        for index, batch in enumerate(self._batches):
            with self._skipping(self._position, self._results.get(index, {})):
                found.append(self._call(self._model, batch.to(*self._placement)).cpu())
        return found

    def _capture(self, batch: ModelInputs, position: int, results: Mapping[str, Any]) -> Call:
        target = self._model.get_submodule(self._segments[position])
        captured: list[Call] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(Call(args, kwargs))
            raise StopForward

        handle = target.register_forward_pre_hook(hook, with_kwargs=True)
        restored = forwards_restored(self._model.modules())
        with suppress(StopForward), hooks_removed_on_exit([handle]), restored, self._skipping(position, results):
            self._call.run(self._model, batch.to(*self._placement))
        if not captured:
            raise RuntimeError(f"Segment {self._segments[position]!r} was not reached; the model skips its blocks.")
        return captured[0]

    def _skipping(self, position: int, results: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return the context in which the segments before a position return what they are replaced by."""
        modules = [self._model.get_submodule(name) for name in self._segments[:position]]
        return _returning(modules, [results[key] for key in self._keys[:position]])


@contextmanager
def _returning(modules: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Make modules return given outputs instead of computing them."""
    with forwards_restored(modules):
        for module, output in zip(modules, outputs, strict=True):
            module.forward = lambda *args, output=output, **kwargs: output
        yield


@dataclass
class SegmentRecord:
    """First positional inputs of submodules and what submodules returned, by name; `""` is the segment itself."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def run_segment(
    segment: nn.Module, call: Call, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> SegmentRecord:
    """Run a segment until the inputs and outputs of submodules that are named have been recorded."""
    record = SegmentRecord()

    def keep(values: dict[str, Any], name: str, value: Any) -> None:
        values.setdefault(name, value)
        if len(record.inputs) == len(inputs) and len(record.outputs) == len(outputs):
            raise StopForward

    def input_hook(name: str) -> Any:
        return lambda module, args: keep(record.inputs, name, args[0])

    def output_hook(name: str) -> Any:
        return lambda module, args, output: keep(record.outputs, name, output)

    handles = [segment.get_submodule(name).register_forward_pre_hook(input_hook(name)) for name in inputs]
    handles += [segment.get_submodule(name).register_forward_hook(output_hook(name)) for name in outputs]
    with suppress(StopForward), hooks_removed_on_exit(handles):
        call(segment)
    return record


@torch.no_grad()
def record_calls(segment: nn.Module, call: Call) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Return the names and first inputs of all submodules in the order of their calls, and the segment's output."""
    calls: list[tuple[str, Tensor]] = []

    def input_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                calls.append((name, args[0]))

        return hook

    modules = {name: module for name, module in segment.named_modules() if name}
    with hooks_removed_on_exit(each.register_forward_pre_hook(input_hook(name)) for name, each in modules.items()):
        return calls, first_tensor(call(segment))


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states among what a block returns: the tensor itself, or the first one however it is nested."""
    return output if isinstance(output, Tensor) else tensors_in(output)[0]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, in their order, however it is nested."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list | tuple) else []
