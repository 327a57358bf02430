"""Latency of several models, measured side by side."""

from __future__ import annotations

import math
import statistics
import timeit
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..runtime.forward import evaluation_mode


# Of fewer values, the smallest and the largest do not enclose the median with 95 % confidence.
MIN_REPEATS = 6

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Latency:
    """How long a model takes for one batch.

    Attributes:
        batch_size: Images per forward pass.
        seconds: Wall time of a forward pass, one value per repetition.
    """

    batch_size: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of `seconds`."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of `seconds`."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return self.batch_size / self.median


@dataclass(frozen=True)
class TimeRatio:
    """The time of one model divided by that of another: median over repetitions, and `low` to `high` its 95 % interval."""

    median: float
    low: float
    high: float


def measure_latency(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    *,
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.05,
) -> dict[str, Latency]:
    """Time forward passes of several models over the same batch, in turns.

    Each repetition times every model once, starting with another one each time, so that a machine that slows down slows
    down all of them. Models run without gradients, in evaluation mode, and are left as they were. On an accelerator the
    clock is read when all its work is done.

    Args:
        models: By name, on the inputs' device.
        inputs: Keyword arguments for all models; one of them is `pixel_values`, `[batch, channels, height, width]`.
        repeats: Number of repetitions, at least 6.
        warmup: Forward passes of every model that are not timed; at least one.
        min_seconds: Minimum time of a repetition, which makes as many passes as it takes, equally many for all models.

    Raises:
        ValueError: for too few repetitions or warm-up passes.
    """
    device = next(tensor.device for tensor in tree_leaves(dict(inputs)) if isinstance(tensor, Tensor))
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluation_mode(model))
        return measure_calls(
            {name: partial(model, **inputs) for name, model in models.items()},
            len(inputs["pixel_values"]),
            device=device,
            repeats=repeats,
            warmup=warmup,
            min_seconds=min_seconds,
        )


def measure_calls(
    calls: Mapping[str, Callable[[], Any]],
    batch_size: int,
    *,
    device: torch.device | None = None,
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.05,
) -> dict[str, Latency]:
    """Time calls in turns, whatever they run; see `measure_latency`, which times models of PyTorch.

    Args:
        calls: By name; each processes one batch.
        batch_size: Images of a batch.
        device: Where PyTorch works; default: the CPU.
        repeats: As for `measure_latency`.
        warmup: The same.
        min_seconds: The same.

    Raises:
        ValueError: for too few repetitions or warm-up passes.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats={repeats} is too few for an interval; use {MIN_REPEATS} or more.")
    if warmup < 1:
        raise ValueError(f"warmup={warmup} is not positive; the first pass of a model is always slower.")
    device = torch.device("cpu") if device is None else device
    times = time_in_turns(calls, device, repeats=repeats, warmup=warmup, min_seconds=min_seconds, equally=True)
    return {name: Latency(batch_size, values) for name, values in times.items()}


def time_in_turns(
    functions: Mapping[Name, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int = 1,
    min_seconds: float = 0.0,
    equally: bool = False,
    on_turn: Callable[[], Any] = lambda: None,
) -> dict[Name, tuple[float, ...]]:
    """Time several functions in turns; return the seconds per call, one value for each repetition.

    Args:
        functions: By name.
        device: Where they work; the clock is read when all its work is done.
        repeats: Number of repetitions, each of which starts with another function.
        warmup: Calls of each function that are not timed.
        min_seconds: Minimum time of a repetition, which makes as many calls as it takes.
        equally: Whether all functions are called equally often, as often as the fastest needs it.
        on_turn: Called after each function has been timed once, as for a progress bar.
    """

    def seconds(function: Callable[[], Any], calls: int) -> float:
        def work() -> None:
            for _ in range(calls):
                function()
            _synchronize(device)

        _synchronize(device)
        return timeit.timeit(work, number=1) / calls

    for function in functions.values():
        seconds(function, warmup)
    single = {name: seconds(function, 1) for name, function in functions.items()}
    fastest = min(single.values())
    calls = {name: max(1, math.ceil(min_seconds / (fastest if equally else single[name]))) for name in functions}
    times: dict[Name, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(repeats):
        for name in order:
            times[name].append(seconds(functions[name], calls[name]))
            on_turn()
        order.append(order.pop(0))
    return {name: tuple(values) for name, values in times.items()}


def time_ratio(latency: Latency, reference: Latency) -> TimeRatio:
    """Compare two models repetition by repetition; both are from one call of `measure_latency`.

    Raises:
        ValueError: if the two have different numbers of repetitions.
    """
    if len(latency.seconds) != len(reference.seconds):
        raise ValueError(
            f"{len(latency.seconds)} and {len(reference.seconds)} repetitions cannot be paired; measure both models "
            "in one call."
        )
    ratios = [own / other for own, other in zip(latency.seconds, reference.seconds, strict=True)]
    return TimeRatio(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of a population's median, by the sign test.

    It assumes nothing about the distribution of the values, only that they are independent.

    Raises:
        ValueError: if the sample is too small for this confidence.
    """
    ordered, n = sorted(values), len(values)
    # The k smallest values may lie below the median with the probability of at most k heads in n tosses.
    outside, k = 0.0, 0
    while k < n and outside + math.comb(n, k) / 2**n <= (1 - confidence) / 2:
        outside += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise ValueError(f"{n} values are too few for an interval of {confidence:.0%}.")
    return ordered[k - 1], ordered[n - k]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
