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

from ..decomposition import balance
from ..distributed import ALONE, Processes
from ..journal import NO_JOURNAL, Journal
from ..modeling import FactoredLinear, LowRankLinear, replace_module, to_float64
from ..stages import factored_linear
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


def train(
    module: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    num_images: int,
    loss: Callable[[Tensor], Tensor],
    error: Callable[[], float],
    settings: TrainingSettings,
    description: str,
    processes: Processes = ALONE,
    journal: Journal = NO_JOURNAL,
    generators: Sequence[torch.Generator] = (),
) -> TrainingHistory:
    """Train parameters of a module and leave it in the best state that was seen, the first one included.

    Several processes take every step together: each gives its part of the loss, and gradients are summed. Where they
    start from the same parameters, they hold the same ones all the way.

    Args:
        module: What holds the parameters.
        groups: What is trained: groups of `WhitenedAdam`, with `scale` beside them.
        num_images: Images there are.
        loss: Mean loss over the images with these indices, int64, `[batch]`. Of several processes each is asked for the
            same images, and gives its part: the parts of all add up to the mean.
        error: Error on held-out images, the same in all processes.
        settings: How to train.
        description: Of the progress bar.
        processes: Those that share the images out.
        journal: Where it is noted how far the training is, and found when the run goes on.
        generators: Those that `loss` draws from, for the journal.

    Raises:
        ValueError: if the loss becomes NaN or Inf, on all processes if it does on one.
    """
    steps_per_epoch = math.ceil(num_images / settings.batch_size)
    total = settings.epochs * steps_per_epoch
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = WhitenedAdam(
        [{**group, "lr": settings.learning_rate * group.get("scale", 1.0)} for group in groups], settings.learning_rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, total, settings.warmup))
    # Gradients are too small for float16; without it this does nothing.
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=processes.mixed_precision == "fp16")
    generator = torch.Generator().manual_seed(settings.seed)
    others = {"schedule": schedule, "scaler": scaler}
    saved = SavedTraining(journal, processes, parameters, optimizer, others, [generator, *generators])
    if not saved.resume():
        saved.progress.errors, saved.best = [error()], _snapshot(parameters)
    done = saved.progress
    losses, errors = done.losses, done.errors
    progress = logging.tqdm(
        total=total, desc=description, unit="step", initial=done.epoch * steps_per_epoch + done.step
    )
    with progress, _trainable(module, parameters):
        for epoch in range(done.epoch, settings.epochs):
            saved.begin_epoch()
            order = torch.randperm(num_images, generator=generator).split(settings.batch_size)
            for indices in order[done.step :]:
                saved.save_when_due()
                own = loss(indices)
                value = sum(processes.gather(own.item()))
                if not math.isfinite(value):
                    raise ValueError(
                        f"{description}: the loss is {value} in epoch {epoch + 1}; lower "
                        f"learning_rate={settings.learning_rate}, or use dtype='float32'."
                    )
                optimizer.zero_grad(set_to_none=True)
                with processes.agreed():
                    scaler.scale(own).backward()
                processes.sum_gradients(parameters)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, settings.max_norm)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                done.sum_of_losses += value * len(indices)
                done.step += 1
                progress.update()
            losses.append(done.sum_of_losses / num_images)
            errors.append(error())
            done.epoch, done.step, done.sum_of_losses = epoch + 1, 0, 0.0
            progress.set_postfix(loss=f"{losses[-1]:.4g}", held_out=f"{errors[-1]:.4g}")
            if errors[-1] < min(errors[:-1]):
                saved.best = _snapshot(parameters)
        saved.begin_epoch()
        saved.save_when_due()
    with torch.no_grad():
        for parameter, value in zip(parameters, saved.best, strict=True):
            parameter.copy_(value)
    return TrainingHistory(losses, errors)


@contextmanager
def balanced_factors(model: nn.Module) -> Iterator[list[str]]:
    """Hold factored layers as balanced factors, in which steps of one size suit both; afterwards in their own layout.

    A model in half precision is trained in float32, since small steps would be lost. After an exception the layers are
    as they were.

    Yields:
        Names of the factored layers.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    for name, layer in layers.items():
        replace_module(model, name, _balanced(layer))
    if dtype in (torch.float16, torch.bfloat16):
        model.to(torch.float32)
    try:
        yield list(layers)
    except BaseException:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        model.to(dtype)
        raise
    model.to(dtype)
    for name, old in layers.items():
        trained = model.get_submodule(name)
        A, B = to_float64(trained.factor_a.weight), to_float64(trained.factor_b.weight)
        layer = factored_linear(trained.to_linear(), A, B, old.layout)
        before = dict(old.named_parameters())
        for key, parameter in layer.named_parameters():
            # A layer that is stored otherwise than before may have other biases.
            parameter.requires_grad_(before.get(key, old.factor_a.weight).requires_grad)
        replace_module(model, name, layer.train(old.training))


def _balanced(layer: FactoredLinear) -> LowRankLinear:
    if isinstance(layer, LowRankLinear):
        A, B = to_float64(layer.factor_a.weight), to_float64(layer.factor_b.weight)
    else:
        # The pivot rows times the identity and the coefficients.
        A = to_float64(layer.factor_a.weight)
        identity = torch.eye(layer.rank, dtype=A.dtype, device=A.device)
        B = torch.cat([identity, to_float64(layer.factor_b.weight)]).index_select(0, layer.order.to(A.device))
    weight = layer.factor_a.weight
    A, B = (factor.to(weight) for factor in balance(A, B))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return LowRankLinear.from_factors(A, B, bias).train(layer.training)


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
