"""Run a model segment by segment over a fixed set of images, holding the activations at one boundary only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.hooks import hooks_removed_on_exit


@dataclass
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        """Call a module with them."""
        return module(*self.args, **self.kwargs)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors among them."""
        tensors = [each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Keep = Callable[[int, Call], Call]
"""Takes the number of a batch and a call, and returns the call as it is to be held."""


def in_memory(index: int, call: Call) -> Call:
    """Hold a call as it is."""
    return call


class StopForward(Exception):  # noqa: N818 - no error, but the way out of a forward pass whose rest is not needed
    """Ends a forward pass as soon as what was looked for is there."""


def find_segments(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The segments of an encoder, in forward order: elements of the outermost `nn.ModuleList` around every layer.

    Blocks of ViT and DeiT, stages of Swin.

    Args:
        model: Any model.
        names: Layers inside such lists.

    Raises:
        ValueError: if a layer lies in none.
    """
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    segments: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        around = [".".join(parts[: i + 1]) for i in range(1, len(parts)) if ".".join(parts[:i]) in lists]
        if not around:
            raise ValueError(f"Layer {name!r} lies in no stack of blocks (`nn.ModuleList`).")
        segments.setdefault(around[0])
    return list(segments)


class SegmentReplay:
    """The inputs of one segment after the other, for a fixed list of batches.

    To get from one segment to the next, the model runs with all segments so far replaced by the output of the last:
    whatever the encoder does between segments is done by its own code.

    Args:
        model: In evaluation mode.
        segments: Names of the segments in forward order.
        batches: `pixel_values`, each `[batch, channels, height, width]`; gone over for every segment.
        keep: How calls are held.
    """

    def __init__(
        self, model: nn.Module, segments: Sequence[str], batches: Iterable[Tensor], keep: Keep = in_memory
    ) -> None:
        self._model = model
        self._segments = list(segments)
        self._batches = batches
        self._device = getattr(model, "device", next(model.parameters()).device)
        self._dtype = next(model.parameters()).dtype
        self._position = 0
        self._keep = keep
        self.calls = [keep(index, self._capture(batch, 0)) for index, batch in enumerate(batches)]

    @property
    def segment(self) -> nn.Module:
        """The segment whose inputs are held."""
        return self._model.get_submodule(self._segments[self._position])

    @property
    def num_bytes(self) -> int:
        """Bytes of the activations held in memory."""
        return sum(call.num_bytes for call in self.calls)

    def advance(self, outputs: Mapping[int, Any] = MappingProxyType({})) -> bool:
        """Take the inputs of the next segment; False if there is none.

        Args:
            outputs: What the segment, as it is now, gives for the batches with these indices; it is run for the others.
        """
        if self._position + 1 == len(self._segments):
            return False
        for index, batch in enumerate(self._batches):
            output = outputs[index] if index in outputs else self.calls[index](self.segment)
            self.calls[index] = self._keep(index, self._capture(batch, self._position + 1, output))
        self._position += 1
        return True

    def _capture(self, batch: Tensor, position: int, output: Any = None) -> Call:
        skipped = [self._model.get_submodule(name) for name in self._segments[:position]]
        target = self._model.get_submodule(self._segments[position])
        found: list[Call] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Call(args, kwargs))
            raise StopForward

        handle = target.register_forward_pre_hook(hook, with_kwargs=True)
        with suppress(StopForward), hooks_removed_on_exit([handle]), _returning(skipped, output):
            self._model(pixel_values=batch.to(self._device, self._dtype))
        if not found:
            raise RuntimeError(f"Segment {self._segments[position]!r} was not reached; the model skips its blocks.")
        return found[0]


@contextmanager
def _returning(modules: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let modules return a given output instead of computing one."""
    # Accelerate and others put a `forward` of their own on a module; it has to come back.
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@dataclass
class SegmentRun:
    """What a run of a segment has shown.

    Attributes:
        inputs: First positional inputs of submodules.
        outputs: Outputs of submodules, the first tensor of each.
        result: All that the segment itself returned, if its output was asked for.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None


@torch.no_grad()
def run_segment(segment: nn.Module, call: Call, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> SegmentRun:
    """Run a segment until all is there that was asked for.

    Args:
        segment: The segment.
        call: Its arguments.
        inputs: Names within the segment; `""` is not allowed.
        outputs: Names within the segment; `""` is the segment itself.
    """
    run = SegmentRun()

    def check() -> None:
        if len(run.inputs) == len(inputs) and len(run.outputs) == len(outputs):
            raise StopForward

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            run.inputs.setdefault(name, args[0])
            check()

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            run.outputs.setdefault(name, first_tensor(output))
            if not name:
                run.result = output
            check()

        return hook

    handles = [segment.get_submodule(name).register_forward_pre_hook(before(name)) for name in inputs]
    handles += [segment.get_submodule(name).register_forward_hook(after(name)) for name in outputs]
    with suppress(StopForward), hooks_removed_on_exit(handles):
        call(segment)
    return run


def first_tensor(output: Any) -> Tensor:
    """The hidden states among what a block returns: the tensor itself or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]
