"""Held-out images decide: a compensation step that fails the test on images it did not learn from is undone."""

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
from ..runtime.fidelity import output_divergence
from ..runtime.forward import evaluation_mode, placement
from ..runtime.inputs import ModelInputs, concatenated
from ..runtime.intervals import Z95_ONE_SIDED
from ..runtime.outputs import PLAIN_CALL, ModelCall, ModelOutput
from .compensator import CompensationResult, CompensationTask, Compensator


def split_batches(
    batches: Mapping[int, ModelInputs], share: float, seed: int, processes: Processes = SINGLE_PROCESS
) -> tuple[dict[int, ModelInputs], list[ModelInputs]]:
    """Split images at random into those to learn from and those that are held out; both keep their order.

    The split does not depend on how images are batched or shared between processes.

    Args:
        batches: This process's batches, by number.
        share: Share of the images to hold out, in (0, 1).
        seed: Seed of the random split.
        processes: The processes that share the batches.

    Returns:
        What remains of the batches, by number, and the held-out images of this process, batched again.

    Raises:
        ValueError: if there are fewer than two images.
    """
    learn: dict[int, ModelInputs] = {}
    held_out = []
    for number, mask in held_out_masks(batches, share, seed, processes).items():
        held_out.append(batches[number][mask])
        if not mask.all():
            learn[number] = batches[number][~mask]
    size = max(processes.gather(max(map(len, batches.values()), default=1)))
    found = [each for each in held_out if len(each)]
    return learn, concatenated(found).split(size) if found else []


def held_out_masks(
    batches: Mapping[int, ModelInputs], share: float, seed: int, processes: Processes = SINGLE_PROCESS
) -> dict[int, Tensor]:
    """Return which images `split_batches` holds out, as one bool mask per batch of this process, by number.

    Raises:
        ValueError: if there are fewer than two images.
    """
    gathered = processes.gather({number: len(batch) for number, batch in batches.items()})
    sizes = {number: size for each in gathered for number, size in each.items()}
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
    masks = is_held_out.split([sizes[number] for number in numbers])
    return {number: mask for number, mask in zip(numbers, masks, strict=True) if number in batches}


@torch.no_grad()
def model_outputs(model: nn.Module, batches: Sequence[ModelInputs], call: ModelCall = PLAIN_CALL) -> list[ModelOutput]:
    """Return the outputs of a model in evaluation mode, on the CPU."""
    place = placement(model)
    with evaluation_mode(model):
        return [call(model, batch.to(*place)).cpu() for batch in batches]


def output_error(
    outputs: Sequence[ModelOutput], references: Sequence[ModelOutput], processes: Processes = SINGLE_PROCESS
) -> float:
    """Return the mean of `output_errors` over the images of all processes."""
    return float(output_errors(outputs, references, processes).mean())


def output_errors(
    outputs: Sequence[ModelOutput],
    references: Sequence[ModelOutput],
    processes: Processes = SINGLE_PROCESS,
    batches: Sequence[ModelInputs] | None = None,
) -> Tensor:
    """Return the error of every image of all processes, `[images]`, float64, on the CPU.

    The error is KL(reference ‖ output) in nats of classes, the relative squared error of features, or the sum of both;
    see `output_divergence`. Of outputs with a row for every token or frame it is the mean over an image's, if the batches
    are given that the outputs are of, and otherwise there is one for each row.
    """
    errors = [output_divergence(reference, output) for output, reference in zip(outputs, references, strict=True)]
    if batches is not None:
        # Rows of one image are alike: counted as independent they would make any difference significant.
        errors = [ModelInputs.of(batch).image_means(error) for batch, error in zip(batches, errors, strict=True)]
    own = [error for each in errors for error in each.tolist()]
    return torch.tensor([error for each in processes.gather(own) for error in each], dtype=torch.float64)


def held_out_errors(task: CompensationTask) -> Tensor:
    """Return the current error of the compressed model on each held-out image; see `output_errors`."""
    with task.processes.raise_on_all_ranks():
        outputs = model_outputs(task.model, task.held_out, task.call)
    return output_errors(outputs, task.references, task.processes, task.held_out)


def held_out_error(task: CompensationTask) -> float:
    """Return the mean of `held_out_errors`."""
    return float(held_out_errors(task).mean())


LARGEST_RISE = 2.0
"""A mean error that has grown by more than this factor is harm, however few images it comes from."""


def is_significantly_larger(after: Tensor, before: Tensor, z: float = Z95_ONE_SIDED) -> bool:
    """Return whether the mean of `after` exceeds that of `before` by more than chance explains.

    A one-sided test of the differences, image by image, whose mean is taken as normally distributed. A single image has no
    spread: any loss counts.

    Args:
        after: Errors of the same images after a step, `[images]`, float64, finite.
        before: Their errors before it, `[images]`, float64, finite.
        z: Standard errors of the mean difference from which on it is significant; by default for a level of about 5 %
            where there are dozens of images.
    """
    difference = after - before
    margin = z * difference.std() / math.sqrt(len(difference)) if len(difference) > 1 else difference.new_zeros(())
    return bool(difference.mean() > margin)


def is_accepted(compensator: Compensator, before: Tensor, after: Tensor) -> bool:
    """Return whether a step stays, by the errors of the held-out images before and after it, `[images]`, float64.

    A step that trains has to lower the mean: it may have learned its images by heart, and has chosen its best state by
    the held-out ones already. A closed form stays unless it raises the mean significantly, or by more than `LARGEST_RISE`:
    a tenth of the images may be few, and where one in twenty holds most of the error their mean would decide by chance.
    """
    if not after.isfinite().all():
        return False
    if not compensator.closed_form or not before.isfinite().all():
        # True of any finite error if the one before is not a number.
        return not bool(after.mean() >= before.mean())
    is_harm = after.mean() > LARGEST_RISE * before.mean() or is_significantly_larger(after, before)
    return not is_harm


def compensate_or_restore(compensator: Compensator, task: CompensationTask) -> CompensationResult:
    """Run a compensator, and restore the model if its result is not accepted; see `is_accepted`."""
    before = held_out_errors(task)
    modes = {name: module.training for name, module in task.model.named_modules()}
    backup = _Backup(task.model)
    details = compensator.compensate(task) if compensator.shares_images else _run_on_all_images(compensator, task)
    after = held_out_errors(task)
    # Sums may be rounded differently in each process.
    kept = task.processes.broadcast(is_accepted(compensator, before, after))
    if not kept:
        backup.restore(task.model)
    for name, module in task.model.named_modules():
        # New layers were made while the model was in evaluation mode.
        module.training = modes[name]
    return CompensationResult(compensator.name, kept, float(before.mean()), float(after.mean()), details)


def _run_on_all_images(compensator: Compensator, task: CompensationTask) -> Mapping[str, Any]:
    """Run a compensator in every process on the images of all; the main process's model is then given to the others."""
    if task.processes.is_single:
        return compensator.compensate(task)
    size = max(task.processes.gather(max(map(len, task.batches), default=1)))
    batches, held_out = (list(images.split(size)) for images in (task.all_images(), task.all_held_out()))
    with task.processes.raise_on_all_ranks():
        whole = replace(
            task,
            batches=batches,
            numbers=(),
            held_out=held_out,
            references=model_outputs(task.original, held_out, task.call),
            processes=task.processes.apart(),
            # Decoding them would exchange messages between processes.
            high_resolution=None,
        )
        details = compensator.compensate(whole)
    # Not all kernels of a GPU give the same bits every time.
    share_model(task.model, task.targets, task.processes)
    return task.processes.broadcast(details)


class _Backup:
    """Copies of the factored layers and of the values of all other parameters."""

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
