"""The one rule of all compensators: what does not lower the error on held-out images is not kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.factorize import share_model
from ..checkpoint.modeling import FactoredLinear, replace_module
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.fidelity import kl_divergence, relative_error
from ..runtime.forward import evaluation_mode
from ..runtime.outputs import ModelOutput, select_output
from .compensator import CompensationResult, CompensationTask, Compensator


def split_batches(
    batches: Mapping[int, Tensor], share: float, seed: int, processes: Processes = SINGLE_PROCESS
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Split images at random into those to learn from and those that are held out; each part keeps its order.

    Which images are held out does not depend on how they are batched or shared out.

    Args:
        batches: `pixel_values` by number of the batch among those of all processes; their order may be that of the
            classes.
        share: Share of the images to hold out, in (0, 1).
        seed: Of the draw.
        processes: Those that share the batches out.

    Returns:
        What is left of the batches, by number, and the held-out images of this process, in batches of their own.

    Raises:
        ValueError: if there are fewer than two images.
    """
    learn, held_out = {}, []
    for number, part in held_out_masks(batches, share, seed, processes).items():
        held_out.append(batches[number][part])
        if not part.all():
            learn[number] = batches[number][~part]
    together = torch.cat(held_out) if held_out else torch.zeros(0)
    size = max(processes.gather(max(map(len, batches.values()), default=1)))
    return learn, list(together.split(size)) if len(together) else []


def held_out_masks(
    batches: Mapping[int, Tensor], share: float, seed: int, processes: Processes = SINGLE_PROCESS
) -> dict[int, Tensor]:
    """Which images of the batches of this process `split_batches` holds out, bool, by number of the batch.

    Raises:
        ValueError: as `split_batches`.
    """
    found = processes.gather({number: len(batch) for number, batch in batches.items()})
    sizes = {number: size for each in found for number, size in each.items()}
    total = sum(sizes.values())
    count = min(max(1, math.ceil(share * total)), total - 1)
    if count < 1:
        raise ValueError(
            f"Compensation holds a share of the images out, which needs at least 2; there are {total}. Give more "
            "calibration images."
        )
    is_held_out = torch.zeros(total, dtype=torch.bool)
    is_held_out[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]] = True
    numbers = sorted(sizes)
    parts = is_held_out.split([sizes[number] for number in numbers])
    return {number: part for number, part in zip(numbers, parts, strict=True) if number in batches}


@torch.no_grad()
def model_outputs(model: nn.Module, batches: Sequence[Tensor]) -> list[ModelOutput]:
    """Outputs of a model in evaluation mode, on the CPU."""
    parameter = next(model.parameters())
    device = getattr(model, "device", parameter.device)
    config = getattr(model, "config", None)
    with evaluation_mode(model):
        return [
            select_output(model(pixel_values=batch.to(device, parameter.dtype)), config).cpu() for batch in batches
        ]


def output_error(
    outputs: Sequence[ModelOutput], references: Sequence[ModelOutput], processes: Processes = SINGLE_PROCESS
) -> float:
    """Mean over the images of all processes: KL(reference ‖ output) in nats, or relative squared error of features."""
    errors = []
    for output, reference in zip(outputs, references, strict=True):
        if output.logits is not None and reference.logits is not None:
            errors.append(kl_divergence(reference.logits, output.logits))
        else:
            pairs = zip(reference.features, output.features, strict=True)
            errors.append(torch.stack([relative_error(*pair) for pair in pairs]).mean(dim=0))
    total = sum(float(error.double().sum()) for error in errors)
    found = processes.gather((total, sum(len(error) for error in errors)))
    return sum(total for total, _ in found) / sum(count for _, count in found)


def held_out_error(task: CompensationTask) -> float:
    """Error of the compressed model, as it is now, on the held-out images; see `output_error`."""
    with task.processes.raise_on_all_ranks():
        outputs = model_outputs(task.model, task.held_out)
    return output_error(outputs, task.references, task.processes)


def accept_if_improved(compensator: Compensator, task: CompensationTask) -> CompensationResult:
    """Run a compensator; put everything back where the error on the held-out images did not fall.

    Args:
        compensator: What to run.
        task: What to run it on.
    """
    before = held_out_error(task)
    modes = {name: module.training for name, module in task.model.named_modules()}
    backup = _Backup(task.model)
    details = compensator.compensate(task) if compensator.shares_images else _same_work(compensator, task)
    after = held_out_error(task)
    kept = after < before
    if not kept:
        backup.restore(task.model)
    for name, module in task.model.named_modules():
        # New layers were made while the model was in evaluation mode.
        module.training = modes[name]
    return CompensationResult(compensator.name, kept, before, after, details)


def _same_work(compensator: Compensator, task: CompensationTask) -> Mapping[str, Any]:
    """Run a compensator on all images in every process; what the main process has made of the model holds for all."""
    if task.processes.is_single:
        return compensator.compensate(task)
    size = max(task.processes.gather(max(map(len, task.batches), default=1)))
    batches, held_out = (list(images.split(size)) for images in (task.all_images(), task.all_held_out()))
    with task.processes.raise_on_all_ranks():
        whole = replace(
            task,
            batches=batches,
            held_out=held_out,
            references=model_outputs(task.original, held_out),
            processes=task.processes.apart(),
            # They are shared out, and would be exchanged.
            high_resolution=None,
        )
        details = compensator.compensate(whole)
    # Not all kernels of a GPU give the same bits every time.
    share_model(task.model, task.targets, task.processes)
    return task.processes.broadcast(details)


class _Backup:
    """Copies of the factored layers, and the values of all other parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            name: copy.deepcopy(module) for name, module in model.named_modules() if isinstance(module, FactoredLinear)
        }
        self._values = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if not any(name.startswith(f"{layer}.") for layer in self._layers)
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        for name, layer in self._layers.items():
            replace_module(model, name, layer)
        parameters = dict(model.named_parameters())
        for name, value in self._values.items():
            parameters[name].copy_(value)
