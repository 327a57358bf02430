"""The state of a training in the journal, so that it goes on between two steps as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.distributed import Processes
from ...runtime.journal import Journal


_NAME = "training"


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: Number of the epoch that goes on.
        step: Steps of this epoch that have been taken.
        sum_of_losses: Over the images of these steps.
        losses: Mean loss of every epoch that is over.
        errors: Held-out error before the first epoch and after every one that is over.
    """

    epoch: int = 0
    step: int = 0
    sum_of_losses: float = 0.0
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


class SavedTraining:
    """What a training has to take up again; all processes hold the same.

    Args:
        journal: Where to save it.
        processes: Those that share the training.
        parameters: What is trained.
        optimizer: Whose state is a number and tensors by parameter.
        others: By name, whatever else has `state_dict` and `load_state_dict` with JSON values, such as the schedule.
        generators: Of random numbers. The first draws the order of an epoch's images: its state is that before the
            epoch; of the others it is the state before the next step.

    Attributes:
        progress: How far it is.
        best: Parameters of the best state so far.
    """

    def __init__(
        self,
        journal: Journal,
        processes: Processes,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        others: dict[str, Any],
        generators: Sequence[torch.Generator],
    ) -> None:
        self.progress = Progress()
        self.best: list[Tensor] = []
        self._journal = journal
        self._processes = processes
        self._parameters = parameters
        self._optimizer = optimizer
        self._others = others
        self._generators = generators
        self._order = generators[0].get_state()

    def begin_epoch(self) -> None:
        """Note the state from which the order of the images is drawn."""
        self._order = self._generators[0].get_state()

    @torch.no_grad()
    def resume(self) -> bool:
        """Take up what was saved; whether there was anything."""
        with self._processes.raise_on_all_ranks():
            entry = self._journal.load(_NAME, shared=True)
        if not all(self._processes.gather(entry is not None)) or entry is None:
            return False
        tensors, values = entry.tensors, entry.values
        self.progress = Progress(**values["progress"])
        self.best = []
        for index, parameter in enumerate(self._parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
            self.best.append(tensors[f"best.{index}"].to(parameter.device))
            state = dict(values["optimizer"][index])
            prefix = f"optimizer.{index}."
            state |= {
                name.removeprefix(prefix): tensor.to(parameter.device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if state:
                self._optimizer.state[parameter] = state
        for group, rate in zip(self._optimizer.param_groups, values["rates"], strict=True):
            group["lr"] = rate
        for name, each in self._others.items():
            each.load_state_dict(values["others"][name])
        for index, generator in enumerate(self._generators):
            generator.set_state(tensors[f"generator.{index}"])
        return True

    def save_when_due(self) -> None:
        """Save the state before the next step if the last time is long enough ago."""
        if not self._journal.is_kept:
            return
        with self._processes.raise_on_all_ranks():
            if self._journal.due():
                self._save()

    def _save(self) -> None:
        tensors = {"generator.0": self._order}
        tensors |= {f"generator.{index}": each.get_state() for index, each in enumerate(self._generators) if index}
        numbers: list[dict[str, Any]] = []
        for index, (parameter, best) in enumerate(zip(self._parameters, self.best, strict=True)):
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"parameter.{index}": parameter, f"best.{index}": best}
            tensors |= {
                f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)
            }
            numbers.append({name: value for name, value in state.items() if not isinstance(value, Tensor)})
        values = {
            "progress": vars(self.progress),
            "optimizer": numbers,
            "rates": [group["lr"] for group in self._optimizer.param_groups],
            "others": {name: each.state_dict() for name, each in self._others.items()},
        }
        self._journal.save(_NAME, tensors, values, shared=True)
