"""Sharing work between the processes that `accelerate launch` starts; with a single process every exchange is a no-op.

A pass over images looks the same for any number of processes. Each works on its own batches inside
`Processes.raise_on_all_ranks`, which turns an error in one process into the same error in all of them, and results are
exchanged afterwards. Nothing may be exchanged inside: a process that has failed would not take part, and the others
would wait for it forever.
"""

from __future__ import annotations

import builtins
import logging as python_logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process and its place among those that work together.

    Attributes:
        index: Index of this process, from 0.
        count: Number of processes.
        device: Device on which this process computes.
        exchange_device: Device through which tensors are exchanged: NCCL needs them on a GPU, gloo on the CPU.
        mixed_precision: As in `Accelerator`: `"no"`, `"bf16"` or `"fp16"`.

    Raises:
        ValueError: for another mixed precision.
    """

    index: int = 0
    count: int = 1
    device: torch.device = _CPU
    exchange_device: torch.device = _CPU
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("no", *AUTOCAST_DTYPES):
            raise ValueError(
                f"mixed_precision={self.mixed_precision!r} is not supported; choose 'no', 'bf16' or 'fp16' for the "
                "Accelerator."
            )

    @property
    def is_main(self) -> bool:
        """Whether this process prints, saves and shows progress."""
        return self.index == 0

    @property
    def is_single(self) -> bool:
        """Whether this is the only process."""
        return self.count == 1

    def owns(self, batch: int) -> bool:
        """Whether this process works on the batch with this number; batches are numbered across all processes."""
        return batch % self.count == self.index

    def part(self, count: int) -> tuple[slice, float]:
        """Return which of `count` items, known to all processes, this one works on, and the share of all that they are.

        A process for which no item is left gets the first one with a share of zero, so that it has something to
        exchange.
        """
        sizes = [count // self.count + (index < count % self.count) for index in range(self.count)]
        start, size = sum(sizes[: self.index]), sizes[self.index]
        return (slice(start, start + size), size / count) if size else (slice(0, 1), 0.0)

    def largest_share(self, count: int, batch_size: int) -> int:
        """Return the most items that one process gets when `count` items are distributed in whole batches."""
        batches = math.ceil(math.ceil(count / batch_size) / self.count)
        return min(count, batches * batch_size)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which forward passes on this device run in the requested mixed precision."""
        if self.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(device.type, AUTOCAST_DTYPES[self.mixed_precision])

    def apart(self) -> Processes:
        """Return this process as a single one with the same mixed precision, for work without any exchange."""
        return Processes(mixed_precision=self.mixed_precision)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise an error from the body in all processes; if several fail, that of the first one.

        Processes that did not fail raise the built-in exception from which the error derives, with the same message.
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
        if own is not None and described == failed[0]:
            raise own
        if failed:
            raise _rebuild(*failed[0]) from own

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes in their order; for small objects that can be pickled."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def all_or_none(self, value: Value | None) -> Value | None:
        """Return the value if every process has one, else None; every process calls this."""
        return value if all(self.gather(value is not None)) else None

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """Return the value of the process `source`; for small objects that can be pickled."""
        if self.is_single:
            return value
        values = [value if self.index == source else None]
        torch.distributed.broadcast_object_list(values, source)
        return values[0]  # type: ignore[return-value] # `source` has filled it in

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place and in its dtype; all get bitwise the same result."""
        if not self.is_single:
            sent = tensor.to(self.exchange_device).contiguous()
            torch.distributed.all_reduce(sent)
            tensor.copy_(sent)
        return tensor

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Sum the gradients of parameters over all processes in one exchange; a missing gradient counts as zero."""
        if self.is_single:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        total = self.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
            parameter.grad = gradient.copy_(part.view_as(gradient))

    def send(
        self, tensors: Mapping[str, Tensor] | None, source: int, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Return the named tensors of the process `source` in all processes; the others receive them on `device`."""
        if self.is_single:
            return dict(tensors or {})
        own = dict(tensors or {}) if self.index == source else {}
        described = self.broadcast([(name, tensor.shape, tensor.dtype) for name, tensor in own.items()], source)
        received = {}
        for name, shape, dtype in described:
            if name in own:
                sent = own[name].detach().to(self.exchange_device).contiguous()
            else:
                sent = torch.empty(shape, dtype=dtype, device=self.exchange_device)
            if sent.numel():
                torch.distributed.broadcast(sent, source)
            received[name] = own[name] if name in own else sent.to(device)
        return received

    def collect(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the numbered tensors of all processes in each, on the CPU and in the order of their numbers."""
        found: dict[str, Tensor] = {}
        for source in range(self.count):
            found.update(self.send({str(number): tensor for number, tensor in tensors.items()}, source))
        return {number: found[str(number)] for number in sorted(map(int, found))}

    def balance_tasks(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Assign tasks to processes by cost so that all take about as long: the costliest first, to the least busy."""
        busy = [0.0] * self.count
        owners = {}
        for name in sorted(costs, key=lambda name: costs[name], reverse=True):
            owners[name] = busy.index(min(busy))
            busy[owners[name]] += costs[name]
        return owners


SINGLE_PROCESS = Processes()


def find_processes(accelerator: Accelerator | PartialState | None = None) -> Processes:
    """Return the processes that an `Accelerator` connects.

    Args:
        accelerator: If None and several processes were launched (`accelerate launch`, `torchrun`), a `PartialState`
            connects them; an `Accelerator` with any settings may still be made later.

    Raises:
        RuntimeError: if several processes were launched but the accelerator knows of one only, or if they are not
            connected by `torch.distributed`.
        ValueError: for a mixed precision other than bf16 and fp16.
    """
    if accelerator is None and was_launched():
        from accelerate import PartialState

        # On a machine without a GPU, `PartialState` connects the processes only if it is told to use the CPU.
        accelerator = PartialState(cpu=not torch.accelerator.is_available())
    # A `PartialState` has no mixed precision; `accelerate launch --mixed_precision` sets it for a single process too.
    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    mixed_precision = getattr(accelerator, "mixed_precision", None) or launched_precision
    if accelerator is None:
        return Processes(mixed_precision=mixed_precision)
    device = accelerator.device
    if accelerator.num_processes == 1:
        if was_launched():
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but the Accelerator of each works alone. On CPUs, "
                "make it with `Accelerator(cpu=True)`, or set ACCELERATE_USE_CPU=true."
            )
        return Processes(device=device, mixed_precision=mixed_precision)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"The {accelerator.num_processes} processes ({accelerator.distributed_type}) are not connected by "
            "`torch.distributed`; use GPUs or CPUs, or one process."
        )
    on_cpu = torch.distributed.get_backend() in ("gloo", "mpi")
    return Processes(
        accelerator.process_index, accelerator.num_processes, device, _CPU if on_cpu else device, mixed_precision
    )


def was_launched() -> bool:
    """Whether a launcher started this process together with others."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_index() -> int:
    """Return the index of this process among those launched together, connected or not; 0 for a single one."""
    return int(os.environ.get("RANK", "0")) if was_launched() else 0


def disconnect() -> None:
    """Close the connection to other processes, if there is one, at the end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_unless_main(processes: Processes) -> Iterator[None]:
    """Silence progress bars and all messages below errors in every process but the main one."""
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
    """Return the built-in base class of an error and its message; other classes may not exist in another process."""
    kind = next(each for each in type(error).__mro__ if each.__module__ == "builtins")
    return kind.__name__, str(error)


def _rebuild(kind: str, message: str) -> Exception:
    try:
        return getattr(builtins, kind)(message)
    except TypeError:  # a few need more than a message
        return RuntimeError(message)
