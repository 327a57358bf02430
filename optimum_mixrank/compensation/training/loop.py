"""Gradient steps for compensators: one loop, which keeps the best state that the held-out images have seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.journal import NO_JOURNAL, Journal
from .saved_training import SavedTraining
from .whitening import WhitenedAdam


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        epochs: Passes over the images.
        learning_rate: Peak of the cosine schedule; a group's own `scale` multiplies it.
        batch_size: Images per step.
        seed: Of the order of the images.
        warmup: Share of the steps over which the learning rate rises linearly.
        max_norm: Gradients are clipped to it.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    warmup: float = 0.1
    max_norm: float = 1.0


@dataclass(frozen=True)
class TrainingHistory:
    """What happened.

    Attributes:
        losses: Mean loss of every epoch.
        errors: Held-out error before the first epoch and after every epoch.
    """

    losses: Sequence[float]
    errors: Sequence[float]

    @property
    def best_epoch(self) -> int:
        """After how many epochs the kept state was reached; 0 is the state before training."""
        return min(range(len(self.errors)), key=self.errors.__getitem__)


@dataclass(frozen=True)
class Trainer:
    """Trains parameters of a module and leaves it in the best state that was seen, the first one included.

    Several processes take every step together: each gives its part of the loss, and gradients are summed. Where they
    start from the same parameters, they hold the same ones all the way.

    Attributes:
        module: What holds the parameters.
        groups: What is trained: groups of `WhitenedAdam`, with `scale` beside them.
        settings: How to train.
        description: Of the progress bar.
        processes: Those that share the images out.
        journal: Where it is kept how far the training is, and found when the run goes on.
        generators: Those that the loss draws from, for the journal.
    """

    module: nn.Module
    groups: Sequence[Mapping[str, Any]]
    settings: TrainingSettings
    description: str
    processes: Processes = SINGLE_PROCESS
    journal: Journal = NO_JOURNAL
    generators: Sequence[torch.Generator] = ()

    def train(self, num_images: int, loss: Callable[[Tensor], Tensor], error: Callable[[], float]) -> TrainingHistory:
        """Train.

        Args:
            num_images: Images there are.
            loss: Mean loss over the images with these indices, int64, `[batch]`. Of several processes each is asked for
                the same images, and gives its part: the parts of all add up to the mean.
            error: Error on held-out images, the same in all processes.

        Raises:
            ValueError: if the loss becomes NaN or Inf, on all processes if it does on one.
        """
        settings = self.settings
        steps_per_epoch = math.ceil(num_images / settings.batch_size)
        update = _Update(self, settings.epochs * steps_per_epoch)
        order = torch.Generator().manual_seed(settings.seed)
        saved = SavedTraining(
            self.journal, self.processes, update.parameters, update.optimizer, update.state, [order, *self.generators]
        )
        if not saved.resume():
            saved.progress.errors, saved.best = [error()], _snapshot(update.parameters)
        done = saved.progress
        start = done.epoch * steps_per_epoch + done.step
        bar = logging.tqdm(total=update.total, desc=self.description, unit="step", initial=start)
        with bar, _trainable(self.module, update.parameters):
            for epoch in range(done.epoch, settings.epochs):
                saved.begin_epoch()
                batches = torch.randperm(num_images, generator=order).split(settings.batch_size)
                for indices in batches[done.step :]:
                    saved.save_when_due()
                    done.sum_of_losses += update.take(loss, indices, epoch) * len(indices)
                    done.step += 1
                    bar.update()
                done.losses.append(done.sum_of_losses / num_images)
                done.errors.append(error())
                done.epoch, done.step, done.sum_of_losses = epoch + 1, 0, 0.0
                bar.set_postfix(loss=f"{done.losses[-1]:.4g}", held_out=f"{done.errors[-1]:.4g}")
                if done.errors[-1] < min(done.errors[:-1]):
                    saved.best = _snapshot(update.parameters)
            saved.begin_epoch()
            saved.save_when_due()
        with torch.no_grad():
            for parameter, value in zip(update.parameters, saved.best, strict=True):
                parameter.copy_(value)
        return TrainingHistory(done.losses, done.errors)


class _Update:
    """Steps of the optimizer.

    Args:
        trainer: What is trained, and how.
        total: Steps of the whole training.
    """

    def __init__(self, trainer: Trainer, total: int) -> None:
        settings = trainer.settings
        self.total = total
        self.parameters = [parameter for group in trainer.groups for parameter in group["params"]]
        rate = settings.learning_rate
        groups = [{**group, "lr": rate * group.get("scale", 1.0)} for group in trainer.groups]
        self.optimizer = WhitenedAdam(groups, rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _cosine(step, total, settings.warmup)
        )
        # Gradients are too small for float16; without it this does nothing.
        is_half = trainer.processes.mixed_precision == "fp16"
        self._scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=is_half)
        self.state = {"schedule": self._schedule, "scaler": self._scaler}
        self._trainer = trainer

    def take(self, loss: Callable[[Tensor], Tensor], indices: Tensor, epoch: int) -> float:
        """Take one step, and return the loss before it."""
        processes, settings = self._trainer.processes, self._trainer.settings
        own = loss(indices)
        value = sum(processes.gather(own.item()))
        if not math.isfinite(value):
            raise ValueError(
                f"{self._trainer.description}: the loss is {value} in epoch {epoch + 1}; lower "
                f"learning_rate={settings.learning_rate}, or use dtype='float32'."
            )
        self.optimizer.zero_grad(set_to_none=True)
        with processes.raise_on_all_ranks():
            self._scaler.scale(own).backward()
        processes.sum_gradients(self.parameters)
        self._scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, settings.max_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()
        return value


@contextmanager
def _trainable(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters collect gradients; afterwards all are as trainable as before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


def _snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _cosine(step: int, total: int, warmup: float) -> float:
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
