"""The state of a training in the journal, from which it continues as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.distributed import Processes
from ...runtime.journal import Journal


_NAME = "training"


@dataclass
class TrainingProgress:
    """How far a training has come: the current epoch, the steps taken in it, and the sum of the losses of their images.

    Attributes:
        losses: Mean loss of every finished epoch.
        errors: Held-out error before the first epoch and after every finished one.
    """

    epoch: int = 0
    step: int = 0
    sum_of_losses: float = 0.0
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The number of epochs after which the error was lowest; 0 is the state before training."""
        return min(range(len(self.errors)), key=self.errors.__getitem__)


@dataclass
class SavedTraining:
    """The state from which a training can continue; it is the same in all processes.

    Attributes:
        journal: The journal to save it in.
        processes: The processes that train together.
        parameters: The trained parameters.
        optimizer: The optimizer, whose state is a number and tensors for each parameter.
        others: By name, other objects whose `state_dict` consists of JSON values, such as the schedule.
        generators: Generators of random numbers. The first one, which draws the order of an epoch's images, is saved as
            it was before the epoch, and the others as they are before the next step.
        progress: How far the training has come.
        best: The best parameters so far.
    """

    journal: Journal
    processes: Processes
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    others: Mapping[str, Any]
    generators: Sequence[torch.Generator]
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    best: list[Tensor] = field(default_factory=list)

    def begin_epoch(self) -> None:
        """Remember the state from which the order of the images is drawn."""
        self._order = self.generators[0].get_state()

    @torch.no_grad()
    def resume(self) -> bool:
        """Restore the saved state, and return whether there was one."""
        with self.processes.raise_on_all_ranks():
            entry = self.journal.load(_NAME, shared=True)
        entry = self.processes.all_or_none(entry)
        if entry is None:
            return False
        tensors, values = entry.tensors, entry.values
        self.progress = TrainingProgress(**values["progress"])
        self.best = []
        for index, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
            self.best.append(tensors[f"best.{index}"].to(parameter.device))
            prefix = f"optimizer.{index}."
            state = dict(values["optimizer"][index])
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    state[name.removeprefix(prefix)] = tensor.to(parameter.device)
            if state:
                self.optimizer.state[parameter] = state
        for group, rate in zip(self.optimizer.param_groups, values["rates"], strict=True):
            group["lr"] = rate
        for name, each in self.others.items():
            each.load_state_dict(values["others"][name])
        for index, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator.{index}"])
        return True

    def save_when_due(self) -> None:
        """Save the state before the next step if a new entry of the journal is due."""
        if self.journal.is_kept:
            with self.processes.raise_on_all_ranks():
                if self.journal.due():
                    self._save()

    def _save(self) -> None:
        tensors = {f"generator.{index}": generator.get_state() for index, generator in enumerate(self.generators)}
        tensors["generator.0"] = self._order
        numbers: list[dict[str, Any]] = []
        for index, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors |= {f"parameter.{index}": parameter, f"best.{index}": best}
            numbers.append({})
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers[-1][name] = value
        values = {
            "progress": vars(self.progress),
            "optimizer": numbers,
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "others": {name: each.state_dict() for name, each in self.others.items()},
        }
        self.journal.save(_NAME, tensors, values, shared=True)
