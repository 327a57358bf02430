"""The training loop of compensators, which keeps the best state as judged by held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...checkpoint.configuration import MixRankConfig
from ...runtime.distributed import SINGLE_PROCESS, Processes
from ...runtime.journal import NO_JOURNAL, Journal
from .saved_training import SavedTraining, TrainingProgress
from .whitening import WhitenedAdam


WARMUP = 0.1
"""Share of the steps over which the learning rate rises linearly."""

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Trainer:
    """Trains parameters of a module, and leaves it in the best state seen, which may be the initial one.

    Several processes take every step together: each computes its part of the loss, and gradients are summed, so that
    equal parameters stay equal.

    Attributes:
        module: The module that holds the parameters.
        groups: What to train: parameter groups of `WhitenedAdam`, each with an optional `scale`.
        config: `epochs`, `learning_rate` (the peak of a cosine schedule, multiplied by a group's `scale`), and `seed`.
        batch_size: Number of images per step.
        description: Label of the progress bar.
        processes: The processes that share the images.
        journal: Where the state of the training is saved, and found when an interrupted compression is resumed.
        generators: Generators of random numbers that the loss uses, to be saved too.
    """

    module: nn.Module
    groups: Sequence[Mapping[str, Any]]
    config: MixRankConfig
    batch_size: int
    description: str
    processes: Processes = SINGLE_PROCESS
    journal: Journal = NO_JOURNAL
    generators: Sequence[torch.Generator] = ()

    def train(self, num_images: int, loss: Callable[[Tensor], Tensor], error: Callable[[], float]) -> TrainingProgress:
        """Train, and return the losses and errors of the epochs.

        Args:
            num_images: Number of images.
            loss: Takes indices of images, int64, `[batch]`, and returns the mean loss over these images. Several
                processes are given the same indices, and return parts that add up to the mean.
            error: Returns the error on the held-out images, which is the same in all processes.

        Raises:
            ValueError: if the loss becomes NaN or Inf in any process.
        """
        epochs = self.config.epochs
        steps_per_epoch = math.ceil(num_images / self.batch_size)
        steps = _Steps(self, epochs * steps_per_epoch)
        order = torch.Generator().manual_seed(self.config.seed)
        saved = SavedTraining(
            self.journal, self.processes, steps.parameters, steps.optimizer, steps.others, [order, *self.generators]
        )
        if not saved.resume():
            saved.progress.errors, saved.best = [error()], _snapshot(steps.parameters)
        progress = saved.progress
        initial = progress.epoch * steps_per_epoch + progress.step
        bar = logging.tqdm(total=steps.total, desc=self.description, unit="step", initial=initial)
        with bar, _trainable(self.module, steps.parameters):
            for epoch in range(progress.epoch, epochs):
                saved.begin_epoch()
                batches = torch.randperm(num_images, generator=order).split(self.batch_size)
                for indices in batches[progress.step :]:
                    saved.save_when_due()
                    progress.sum_of_losses += steps.take(loss, indices, epoch) * len(indices)
                    progress.step += 1
                    bar.update()
                progress.losses.append(progress.sum_of_losses / num_images)
                progress.errors.append(error())
                progress.epoch, progress.step, progress.sum_of_losses = epoch + 1, 0, 0.0
                bar.set_postfix(loss=f"{progress.losses[-1]:.4g}", held_out=f"{progress.errors[-1]:.4g}")
                if progress.errors[-1] < min(progress.errors[:-1]):
                    saved.best = _snapshot(steps.parameters)
            saved.begin_epoch()
            saved.save_when_due()
        with torch.no_grad():
            for parameter, value in zip(steps.parameters, saved.best, strict=True):
                parameter.copy_(value)
        return progress


class _Steps:
    """The `total` steps of a training, and the optimizer that takes them."""

    def __init__(self, trainer: Trainer, total: int) -> None:
        self.total = total
        self.parameters = [parameter for group in trainer.groups for parameter in group["params"]]
        rate = trainer.config.learning_rate
        groups = [{**group, "lr": rate * group.get("scale", 1.0)} for group in trainer.groups]
        self.optimizer = WhitenedAdam(groups, rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _cosine(step, total))
        # Gradients are too small for float16; in other precisions the scaler does nothing.
        is_half = trainer.processes.mixed_precision == "fp16"
        self._scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=is_half)
        self.others = {"schedule": self._schedule, "scaler": self._scaler}
        self._trainer = trainer

    def take(self, loss: Callable[[Tensor], Tensor], indices: Tensor, epoch: int) -> float:
        """Take one step, and return the loss before it."""
        processes = self._trainer.processes
        own = loss(indices)
        value = sum(processes.gather(own.item()))
        if not math.isfinite(value):
            raise ValueError(
                f"{self._trainer.description}: the loss is {value} in epoch {epoch + 1}; lower "
                f"learning_rate={self._trainer.config.learning_rate}, or use dtype='float32'."
            )
        self.optimizer.zero_grad(set_to_none=True)
        with processes.raise_on_all_ranks():
            self._scaler.scale(own).backward()
        processes.sum_gradients(self.parameters)
        self._scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()
        return value


@contextmanager
def _trainable(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters of a module collect gradients; afterwards all are as trainable as before."""
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


def _cosine(step: int, total: int) -> float:
    rise = max(1, round(WARMUP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
