"""Accumulate statistics of linear layers with hooks, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..decomposition.statistics import GRADIENT_STATISTICS, LayerStatistics, Statistic
from ..runtime.distributed import Processes
from ..runtime.hooks import OutputListener
from .moments import MeanInputAccumulator, MomentAccumulator


Accumulator = MomentAccumulator | MeanInputAccumulator

_NEW_ACCUMULATOR: dict[Statistic, Callable[[], Accumulator]] = {
    Statistic.INPUT_MEAN: lambda: MomentAccumulator(products=False),
    Statistic.INPUT_VARIANCE: lambda: MomentAccumulator(full=False),
    Statistic.INPUT_COVARIANCE: MomentAccumulator,
    Statistic.OUTPUT_COVARIANCE: MomentAccumulator,
    Statistic.REPRESENTATIVE_INPUT: MeanInputAccumulator,
}


class StatisticsCollector(OutputListener):
    """Context manager that collects statistics of inputs and outputs; no hook remains when it is left.

    `required` names the statistics by module name; those of gradients are ignored. Layers that are called with the same
    tensor, such as query, key and value, share their input statistics: the first of them is their leader, under whose
    name these are kept.
    """

    def __init__(self, model: nn.Module, required: Mapping[str, frozenset[Statistic]]) -> None:
        super().__init__({name: model.get_submodule(name) for name in required})
        self._required = {name: sorted(statistics - GRADIENT_STATISTICS) for name, statistics in required.items()}
        self._accumulated = {name: _without_mean(statistics) for name, statistics in self._required.items()}
        self._accumulators: dict[tuple[str, Statistic], Accumulator] = {}
        self._leaders: dict[str, str] = {}
        self._last_input: Tensor | None = None
        self._last_leader = ""
        self._updated: set[Statistic] = set()

    def check_finite(self) -> None:
        """Raise a ValueError that names the first layer, in forward order, that saw NaN or Inf."""
        for (name, statistic), accumulator in self._accumulators.items():
            if not accumulator.is_finite:
                side = "outputs" if statistic is Statistic.OUTPUT_COVARIANCE else "inputs"
                raise ValueError(
                    f"NaN or Inf in the {side} of layer {name!r}. Check the calibration images and the weights up to "
                    "this layer; a half-precision model may overflow, load it with dtype='float32'."
                )

    def merge(self, processes: Processes) -> None:
        """Merge what all processes have collected; afterwards all hold the same.

        Raises:
            ValueError: if a layer was called in some of the processes that saw images, but not in all.
        """
        found = [each for each in processes.gather((list(self._accumulators), self._leaders)) if each[0]]
        partly = [
            name for keys, _ in found for name, each in keys if any((name, each) not in other for other, _ in found)
        ]
        if partly:
            raise ValueError(
                f"Layer {partly[0]!r} was called for some batches only, so its statistics cannot be collected by several "
                "processes. Leave it out with exclude_modules, or use one process."
            )
        if found:
            # In the same order in all processes, whether they have seen images or not.
            keys, self._leaders = found[0]
            self._accumulators = {key: self._accumulators.get(key) or _NEW_ACCUMULATOR[key[1]]() for key in keys}
        for accumulator in self._accumulators.values():
            accumulator.merge(processes)

    def result(self) -> dict[str, LayerStatistics]:
        """Return the statistics by module name, once; layers that share an input share its tensors.

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
        for name, statistic in counts:
            # Accumulators are freed one by one, so that sums and statistics do not fill the memory together.
            accumulator = self._accumulators.pop((name, statistic))
            tensors[name, statistic] = _finish(statistic, accumulator)
            if statistic is Statistic.INPUT_COVARIANCE:
                tensors.setdefault((name, Statistic.INPUT_MEAN), accumulator.mean())
        return {
            name: LayerStatistics(
                num_tokens=counts[self._key(name, accumulated[0])] if accumulated else 0,
                **{each.value: tensors[self._key(name, each)] for each in self._required[name]},
            )
            for name, accumulated in self._accumulated.items()
        }

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._find_leader(name, args[0])
            for statistic in self._accumulated[name]:
                if statistic is Statistic.OUTPUT_COVARIANCE:
                    self._update(name, statistic, output)
                elif statistic not in self._updated:
                    self._updated.add(statistic)
                    self._update(name, statistic, args[0])

        return hook

    def _forget(self) -> None:
        self._last_input = None

    def _find_leader(self, name: str, tensor: Tensor) -> None:
        """Find the first of the layers that are called one after another with this very tensor."""
        if tensor is not self._last_input:
            self._last_input, self._last_leader = tensor, name
            self._updated.clear()
        leader = self._leaders.setdefault(name, self._last_leader)
        if leader != self._last_leader:
            raise RuntimeError(
                f"Layer {name!r} was called with the input of {leader!r} at first and with that of "
                f"{self._last_leader!r} later; its statistics cannot be shared. Exclude it with exclude_modules."
            )

    def _key(self, name: str, statistic: Statistic) -> tuple[str, Statistic]:
        return self._leaders[name] if statistic.of_input else name, statistic

    def _update(self, name: str, statistic: Statistic, tensor: Tensor) -> None:
        key = self._key(name, statistic)
        if key not in self._accumulators:
            self._accumulators[key] = _NEW_ACCUMULATOR[statistic]()
        self._accumulators[key].update(tensor)


def _without_mean(statistics: list[Statistic]) -> list[Statistic]:
    """Leave out the mean of the inputs if it comes with their covariance."""
    comes_along = Statistic.INPUT_COVARIANCE in statistics
    return [each for each in statistics if each is not Statistic.INPUT_MEAN or not comes_along]


def _finish(statistic: Statistic, accumulator: Accumulator) -> Tensor:
    if isinstance(accumulator, MomentAccumulator) and statistic is not Statistic.INPUT_MEAN:
        return accumulator.covariance()
    return accumulator.mean()
