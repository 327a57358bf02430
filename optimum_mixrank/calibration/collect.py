"""Collect the statistics of many layers while a model runs over calibration images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..decomposition.statistics import GRADIENT_STATISTICS, LayerStatistics, Statistic
from ..distributed import ALONE, Processes
from ..freed import return_freed_memory
from ..hooks import OutputListener
from ..inference import evaluation_mode
from ..journal import NO_JOURNAL, Journal, flatten, unflatten
from ..outputs import select_output
from .fisher import GradientCollector, activation_gradients
from .images import ImageBatches
from .moments import MeanInputAccumulator, MomentAccumulator, to_device
from .saved_pass import SavedPass


Accumulator = MomentAccumulator | MeanInputAccumulator

_NEW_ACCUMULATOR: dict[Statistic, Callable[[], Accumulator]] = {
    Statistic.INPUT_MEAN: lambda: MomentAccumulator(products=False),
    Statistic.INPUT_VARIANCE: lambda: MomentAccumulator(full=False),
    Statistic.INPUT_COVARIANCE: MomentAccumulator,
    Statistic.OUTPUT_COVARIANCE: MomentAccumulator,
    Statistic.REPRESENTATIVE_INPUT: MeanInputAccumulator,
}


class ImageBatch(Protocol):
    """What calibration needs of a batch."""

    @property
    def pixel_values(self) -> Tensor:
        """`[batch, channels, height, width]`."""

    @property
    def index(self) -> int:
        """Number of the batch among those of all processes."""


class StatisticsCollector(OutputListener):
    """Context manager that listens to linear layers; on leaving it, also by an exception, no hook remains.

    Layers that are called with the same tensor, such as query, key and value, share their input statistics.

    Args:
        model: The model that will run.
        required: Statistics to collect, by module name.
    """

    def __init__(self, model: nn.Module, required: Mapping[str, frozenset[Statistic]]) -> None:
        super().__init__({name: model.get_submodule(name) for name in required})
        self._required = {name: sorted(statistics) for name, statistics in required.items()}
        self._summed = {name: _without_mean(statistics) for name, statistics in self._required.items()}
        self._accumulators: dict[tuple[str, Statistic], Accumulator] = {}
        self._leaders: dict[str, str] = {}
        self._last_input: Tensor | None = None
        self._last_leader = ""
        self._taken_in: set[Statistic] = set()

    def check_finite(self) -> None:
        """Check all statistics so far.

        Raises:
            ValueError: names the first layer, in forward order, that saw NaN or Inf.
        """
        for (name, statistic), accumulator in self._accumulators.items():
            if not accumulator.is_finite:
                side = "outputs" if statistic is Statistic.OUTPUT_COVARIANCE else "inputs"
                raise ValueError(
                    f"NaN or Inf in the {side} of layer {name!r}. Check the calibration images and the weights up to "
                    "this layer; a half-precision model may overflow, load it with dtype='float32'."
                )

    def start_from(self, processes: Processes, source: int) -> None:
        """Take over from the process that has run the first batch what all accumulators have to have in common.

        Args:
            processes: Those that share the batches out.
            source: The process that has run one.
        """
        keys, leaders = processes.broadcast((list(self._accumulators), self._leaders), source)
        self._leaders = dict(leaders)
        shifts = processes.send(self._shifts(), source)
        for key in keys:
            accumulator = self._accumulators.setdefault(key, _NEW_ACCUMULATOR[key[1]]())
            if isinstance(accumulator, MomentAccumulator):
                accumulator.shift = shifts[_label(*key)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that has been collected so far, as tensors and JSON values; `resume` is the exact inverse."""
        states = {_label(*key): accumulator.state_dict() for key, accumulator in self._accumulators.items()}
        keys = [[name, statistic.value] for name, statistic in self._accumulators]
        return flatten(states), {"accumulators": keys, "leaders": self._leaders}

    def resume(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device) -> None:
        """Take over what another collector had collected; sums go to the device of the model."""
        self._leaders = dict(values["leaders"])
        states = unflatten(tensors)
        for name, value in values["accumulators"]:
            key = name, Statistic(value)
            self._accumulators[key] = _NEW_ACCUMULATOR[key[1]]()
            self._accumulators[key].load_state_dict(to_device(states[_label(*key)], device))

    def reduce(self, processes: Processes) -> None:
        """Take in what all processes have collected; all hold the same then.

        Raises:
            ValueError: if a layer was called in some processes only.
        """
        called = processes.gather(list(self._accumulators))
        for name, _ in (key for keys in called for key in keys if any(key not in each for each in called)):
            raise ValueError(
                f"Layer {name!r} was called for some batches only, so that its statistics cannot be shared out over "
                "processes. Leave it out with exclude_modules, or use one process."
            )
        for accumulator in self._accumulators.values():
            accumulator.reduce(processes)

    def result(self) -> dict[str, LayerStatistics]:
        """The statistics by module name; layers that share an input share its tensors. To be asked for once.

        Raises:
            ValueError: if a layer was never called, or saw NaN or Inf.
        """
        silent = [name for name in self._layers if name not in self._leaders]
        if silent:
            raise ValueError(
                f"{len(silent)} targeted layers were not called by the model's forward pass, the first is "
                f"{silent[0]!r}. Leave them out with exclude_modules."
            )
        self.check_finite()
        tensors: dict[tuple[str, Statistic], Tensor] = {}
        counts = {key: accumulator.count for key, accumulator in self._accumulators.items()}
        for key in counts:
            # Its sums are let go, so that all sums and all statistics are not there at once.
            accumulator = self._accumulators.pop(key)
            tensors[key] = _finish(key[1], accumulator)
            if key[1] is Statistic.INPUT_COVARIANCE:
                tensors.setdefault((key[0], Statistic.INPUT_MEAN), accumulator.mean())
        return {
            name: LayerStatistics(
                num_tokens=counts[self._owner(name, summed[0]), summed[0]] if summed else 0,
                **{
                    statistic.value: tensors[self._owner(name, statistic), statistic]
                    for statistic in self._required[name]
                },
            )
            for name, summed in self._summed.items()
        }

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._follow(name, args[0])
            for statistic in self._summed[name]:
                if statistic is Statistic.OUTPUT_COVARIANCE:
                    self._update(name, statistic, output)
                elif statistic not in self._taken_in:
                    self._taken_in.add(statistic)
                    self._update(self._last_leader, statistic, args[0])

        return hook

    def _forget(self) -> None:
        self._last_input = None

    def _follow(self, name: str, tensor: Tensor) -> None:
        """Find the first of the layers that are called one after another with this very tensor: it leads."""
        if tensor is not self._last_input:
            self._last_input, self._last_leader = tensor, name
            self._taken_in.clear()
        leader = self._leaders.setdefault(name, self._last_leader)
        if leader != self._last_leader:
            raise RuntimeError(
                f"Layer {name!r} was called with the input of {leader!r} at first and with that of "
                f"{self._last_leader!r} later; its statistics cannot be shared. Exclude it with exclude_modules."
            )

    def _shifts(self) -> dict[str, Tensor]:
        accumulators = {_label(*key): accumulator for key, accumulator in self._accumulators.items()}
        return {
            label: accumulator.shift
            for label, accumulator in accumulators.items()
            if isinstance(accumulator, MomentAccumulator) and accumulator.shift is not None
        }

    def _owner(self, name: str, statistic: Statistic) -> str:
        return name if statistic is Statistic.OUTPUT_COVARIANCE else self._leaders[name]

    def _update(self, owner: str, statistic: Statistic, tensor: Tensor) -> None:
        if (owner, statistic) not in self._accumulators:
            self._accumulators[owner, statistic] = _NEW_ACCUMULATOR[statistic]()
        self._accumulators[owner, statistic].update(tensor)


def _without_mean(statistics: list[Statistic]) -> list[Statistic]:
    """What is to be summed: the sums of a covariance hold the mean."""
    return [
        each for each in statistics if each is not Statistic.INPUT_MEAN or Statistic.INPUT_COVARIANCE not in statistics
    ]


def _label(name: str, statistic: Statistic) -> str:
    return f"{name}:{statistic.value}"


def _finish(statistic: Statistic, accumulator: Accumulator) -> Tensor:
    if isinstance(accumulator, MomentAccumulator) and statistic is not Statistic.INPUT_MEAN:
        return accumulator.covariance()
    return accumulator.mean()


def collect_statistics(
    model: nn.Module,
    batches: Iterable[ImageBatch],
    required: Mapping[str, frozenset[Statistic]],
    num_images: int | None = None,
    *,
    fisher_samples: int = 1,
    seed: int = 42,
    processes: Processes = ALONE,
    journal: Journal = NO_JOURNAL,
) -> tuple[dict[str, LayerStatistics], int]:
    """Run a model over images and collect statistics of its layers.

    One forward pass over the images in evaluation mode, without gradients unless gradients are asked for; the model is
    left as it was. Several processes each run over their own batches; all get the same statistics, those that one
    process gets from all batches up to the order of the sums in float64.

    Args:
        model: A model that takes `pixel_values`.
        batches: Batches of images; of several processes, those of this one.
        required: Statistics to collect, by module name.
        num_images: Their number in all processes, where known, for the progress bar.
        fisher_samples: Random probes per image for statistics of gradients; each costs a backward pass.
        seed: Of these probes.
        processes: Those that share the batches out.
        journal: Where it is noted how far the pass is, and found when the run goes on: batches that were done then are
            not run again, and the result is the same, bit by bit.

    Returns:
        The statistics by module name, and the number of images seen.

    Raises:
        ValueError: if there is no image, a layer is never called, or NaN or Inf occur.
    """
    parameter = next(model.parameters())
    device = getattr(model, "device", parameter.device)
    with_gradients = [name for name, statistics in required.items() if statistics & GRADIENT_STATISTICS]
    projected = [name for name in with_gradients if Statistic.GRADIENT_MOMENT not in required[name]]
    forward = {name: statistics - GRADIENT_STATISTICS for name, statistics in required.items()}
    share = None if num_images is None else math.ceil(num_images / processes.count)
    progress = logging.tqdm(total=share, desc="Calibrating", unit="img")
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        collector = stack.enter_context(StatisticsCollector(model, forward))
        stack.enter_context(progress)
        gradients = None
        if with_gradients:
            gradients = stack.enter_context(GradientCollector(model, with_gradients, fisher_samples, seed, projected))
            stack.enter_context(activation_gradients(model))

        taken = SavedPass(journal, collector, gradients, batches)

        def run(batch: ImageBatch) -> None:
            pixel_values = batch.pixel_values
            pixel_values = pixel_values.to(device, parameter.dtype, non_blocking=pixel_values.is_pinned())
            # Some input has to require gradients for the activations to have any; parameters do not.
            with processes.autocast(device):
                output = model(pixel_values=pixel_values.detach().requires_grad_(bool(with_gradients)))
            if gradients is not None:
                gradients.update(select_output(output, getattr(model, "config", None)), batch.index)
            progress.update(len(pixel_values))
            taken.images += len(pixel_values)
            taken.batches += 1
            # Blocks of a graph of activations leave holes, into which those of the next one do not fit.
            del output, pixel_values
            return_freed_memory(device)

        resumed = taken.resume(processes, device)
        rest = taken.rest(batches)
        if resumed:
            progress.update(taken.images)
        else:
            with processes.agreed():
                waiting = next(rest, None)
            # One process runs the first of all batches, and the others start from what it has found.
            source = processes.first_holder(None if waiting is None else waiting.index)
            with processes.agreed():
                if waiting is not None and processes.index == source:
                    run(waiting)
                    waiting = None
                    collector.check_finite()
            if source is not None and not processes.is_alone:
                collector.start_from(processes, source)
                if gradients is not None:
                    gradients.shifts = processes.send(gradients.shifts, source)
            rest = rest if waiting is None else itertools.chain([waiting], rest)
        with processes.agreed():
            for batch in rest:
                run(batch)
                taken.save_when_due()
            if not processes.is_alone:
                # What others save is of use only beside the entry of this process, which may wait for them for long.
                taken.save()
        if isinstance(batches, ImageBatches):
            batches.settle()
        seen = sum(processes.gather(taken.images))
        if seen == 0:
            raise ValueError("The calibration dataset holds no image; a few hundred are needed.")
        collector.reduce(processes)
        layers = {name: replace(statistics, num_images=seen) for name, statistics in collector.result().items()}
        if gradients is not None:
            gradients.reduce(processes)
            for name in with_gradients:
                layers[name] = replace(layers[name], **gradients.statistics(name, required[name]))
        return layers, seen
