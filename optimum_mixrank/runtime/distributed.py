"""The processes that share one piece of work, as `accelerate launch` starts them; for one alone all of this is nothing.

A pass over images looks the same for any number of processes: each works on its own batches inside
`Processes.raise_on_all_ranks`, where an error on one becomes the same error on all, and what they found is exchanged
afterwards. No exchange may stand inside: a process that has failed would not take part in it.
"""

from __future__ import annotations

import builtins
import logging as python_logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.utils import logging

from .logging import get_logger
from .precision import AUTOCAST_DTYPES


if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

logger = get_logger(__name__)

Value = TypeVar("Value")

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        index: Of this process, from 0.
        count: How many there are.
        device: Where this process is to compute.
        wire: Where tensors have to be to be sent: NCCL knows GPUs alone, gloo the host alone.
        mixed_precision: As of an `Accelerator`: `"no"`, `"bf16"` or `"fp16"`.
    """

    index: int = 0
    count: int = 1
    device: torch.device = _HOST
    wire: torch.device = _HOST
    mixed_precision: str = "no"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, saves and shows progress."""
        return self.index == 0

    @property
    def is_single(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    def owns(self, batch: int) -> bool:
        """Whether the batch with this number, among those of all processes, belongs to this one."""
        return batch % self.count == self.index

    def part(self, count: int) -> tuple[slice, float]:
        """Which of `count` items that all processes see are this one's, and their share of all.

        A process for which none is left looks at the first one, with the share zero, so that it has something to
        exchange.
        """
        sizes = [count // self.count + (index < count % self.count) for index in range(self.count)]
        start, size = sum(sizes[: self.index]), sizes[self.index]
        return (slice(start, start + size), size / count) if size else (slice(0, 1), 0.0)

    def largest_share(self, count: int, batch_size: int) -> int:
        """How many of `count` items one process gets at most, where whole batches are shared out."""
        batches = math.ceil(math.ceil(count / batch_size) / self.count)
        return min(count, batches * batch_size)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Forward passes on this device run in the mixed precision that was asked for; backward passes follow them."""
        if self.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(device.type, AUTOCAST_DTYPES[self.mixed_precision])

    def apart(self) -> Processes:
        """This process as one that works alone, in the same precision."""
        return replace(SINGLE_PROCESS, mixed_precision=self.mixed_precision)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Work of each process for itself; an error on one is raised by all, the first process's where several fail.

        The processes that did not fail raise the built-in exception that the error derives from, with its message.
        """
        if self.is_single:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        described = None if own is None else _describe(own)
        failed = [each for each in self.gather(described) if each is not None]
        if failed:
            raise own if own is not None and described == failed[0] else _rebuild(*failed[0]) from own

    def gather(self, value: Value) -> list[Value]:
        """A small value of every process, in the order of processes."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """A small value of one process."""
        if self.is_single:
            return value
        values = [value if self.index == source else None]
        torch.distributed.broadcast_object_list(values, source)
        return values[0]  # type: ignore[return-value] # `source` has put its value there

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place and in its dtype; all of them get the same bits."""
        if not self.is_single:
            sent = tensor.to(self.wire).contiguous()
            torch.distributed.all_reduce(sent)
            tensor.copy_(sent)
        return tensor

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Sum the gradients of parameters over all processes, in one message; one that has none counts as zero."""
        if self.is_single:
            return
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters
        ]
        total = self.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
            parameter.grad = gradient.copy_(part.view_as(gradient))

    def send(
        self, tensors: Mapping[str, Tensor] | None, source: int, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Tensors of one process, by name, on all of them.

        Args:
            tensors: What to send; looked at on `source` alone.
            source: The process that has them.
            device: Where the others want them.
        """
        if self.is_single:
            return dict(tensors or {})
        own = dict(tensors or {}) if self.index == source else {}
        described = self.broadcast([(name, tensor.shape, tensor.dtype) for name, tensor in own.items()], source)
        received = {}
        for name, shape, dtype in described:
            if self.index == source:
                sent = own[name].detach().to(self.wire).contiguous()
            else:
                sent = torch.empty(shape, dtype=dtype, device=self.wire)
            if sent.numel():
                torch.distributed.broadcast(sent, source)
            received[name] = own[name] if self.index == source else sent.to(device)
        return received

    def collect(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Numbered tensors of all processes on all of them, on the host, in the order of their numbers."""
        found: dict[str, Tensor] = {}
        for source in range(self.count):
            found.update(self.send({str(number): tensor for number, tensor in tensors.items()}, source))
        return {number: found[str(number)] for number in sorted(map(int, found))}

    def balance_tasks(self, costs: Mapping[str, float]) -> dict[str, int]:
        """The process for each task, so that all take about as long: the longest task first, to the least busy."""
        busy = [0.0] * self.count
        owners = {}
        for name in sorted(costs, key=lambda name: costs[name], reverse=True):
            owners[name] = busy.index(min(busy))
            busy[owners[name]] += costs[name]
        return owners


SINGLE_PROCESS = Processes()


def find_processes(accelerator: Accelerator | PartialState | None = None) -> Processes:
    """The processes that an `Accelerator` stands for.

    Args:
        accelerator: Default: where several processes were launched, as by `accelerate launch` and `torchrun`, they are
            connected by a `PartialState`. An `Accelerator` may be made later, with any settings. A process that was
            started alone needs none.

    Raises:
        RuntimeError: if several processes were launched, but the accelerator works alone; or if they are not connected
            by `torch.distributed`.
        ValueError: for a mixed precision other than bf16 and fp16.
    """
    if accelerator is None:
        if not was_launched():
            return _alone(_HOST, _launched_precision())
        from accelerate import PartialState

        # On a machine without GPU the processes are connected only if the CPU is asked for.
        accelerator = PartialState(cpu=not torch.accelerator.is_available())
    # A `PartialState` knows of no precision.
    mixed_precision = getattr(accelerator, "mixed_precision", None) or _launched_precision()
    if accelerator.num_processes == 1:
        if was_launched():
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but the Accelerator of each works alone. On CPUs, "
                "make it with `Accelerator(cpu=True)`, or set ACCELERATE_USE_CPU=true."
            )
        return _alone(accelerator.device, mixed_precision)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"The {accelerator.num_processes} processes ({accelerator.distributed_type}) are not connected by "
            "`torch.distributed`; use GPUs or CPUs, or one process."
        )
    on_host = torch.distributed.get_backend() in ("gloo", "mpi")
    device = accelerator.device
    return replace(
        _alone(device, mixed_precision),
        index=accelerator.process_index,
        count=accelerator.num_processes,
        wire=_HOST if on_host else device,
    )


def _launched_precision() -> str:
    """What `accelerate launch --mixed_precision` has said, to a single process too."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _alone(device: torch.device, mixed_precision: str) -> Processes:
    if mixed_precision not in ("no", *AUTOCAST_DTYPES):
        raise ValueError(
            f"mixed_precision={mixed_precision!r} is not supported; choose 'no', 'bf16' or 'fp16' for the Accelerator."
        )
    return Processes(device=device, mixed_precision=mixed_precision)


def was_launched() -> bool:
    """Whether a launcher has started this process beside others."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_index() -> int:
    """Number of this process among those that a launcher has started; 0 for one alone. They need not be connected."""
    return int(os.environ.get("RANK", "0")) if was_launched() else 0


def disconnect() -> None:
    """End the connection with other processes, if there is one; for the end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_unless_main(processes: Processes) -> Iterator[None]:
    """On all processes but the main one, no progress bars and no messages below errors."""
    if processes.is_main:
        yield
        return
    import datasets

    bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    loggers = [python_logging.getLogger(name) for name in ("optimum_mixrank", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(python_logging.ERROR)
    try:
        yield
    finally:
        if bars[0]:
            logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _describe(error: Exception) -> tuple[str, str]:
    """The built-in class of an error and its message: other classes may not survive the way to another process."""
    kind = next(each for each in type(error).__mro__ if each.__module__ == "builtins")
    return kind.__name__, str(error)


def _rebuild(kind: str, message: str) -> Exception:
    try:
        return getattr(builtins, kind)(message)
    except TypeError:  # a few take more than a message
        return RuntimeError(message)
