"""Listen to linear layers while a model runs, and accumulate their statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..decomposition.statistics import LayerStatistics, Statistic
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

    def merge(self, processes: Processes) -> None:
        """Take in what all processes have collected; all hold the same afterwards.

        Raises:
            ValueError: if a layer was called in some of the processes that saw images, but not in all.
        """
        found = [each for each in processes.gather((list(self._accumulators), self._leaders)) if each[0]]
        for name, _ in (key for keys, _ in found for key in keys if any(key not in other for other, _ in found)):
            raise ValueError(
                f"Layer {name!r} was called for some batches only, so that its statistics cannot be shared out over "
                "processes. Leave it out with exclude_modules, or use one process."
            )
        for keys, leaders in found[:1]:
            self._leaders = dict(leaders)
            # In one order for all, whether they have seen images or not.
            self._accumulators = {key: self._accumulators.get(key) or _NEW_ACCUMULATOR[key[1]]() for key in keys}
        for accumulator in self._accumulators.values():
            accumulator.merge(processes)

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

    def _owner(self, name: str, statistic: Statistic) -> str:
        return self._leaders[name] if statistic.of_input else name

    def _update(self, owner: str, statistic: Statistic, tensor: Tensor) -> None:
        if (owner, statistic) not in self._accumulators:
            self._accumulators[owner, statistic] = _NEW_ACCUMULATOR[statistic]()
        self._accumulators[owner, statistic].update(tensor)


def _without_mean(statistics: list[Statistic]) -> list[Statistic]:
    """What is to be summed: the sums of a covariance hold the mean."""
    return [
        each for each in statistics if each is not Statistic.INPUT_MEAN or Statistic.INPUT_COVARIANCE not in statistics
    ]


def _finish(statistic: Statistic, accumulator: Accumulator) -> Tensor:
    if isinstance(accumulator, MomentAccumulator) and statistic is not Statistic.INPUT_MEAN:
        return accumulator.covariance()
    return accumulator.mean()
