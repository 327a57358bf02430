"""The one rule of all compensators: what does not lower the error on held-out images is not kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..evaluation.fidelity import kl_divergence, relative_error
from ..inference import evaluation_mode
from ..modeling import FactoredLinear, replace_module
from ..outputs import ModelOutput, select_output
from .compensator import Compensation, CompensationResult, Compensator


def split_batches(
    batches: Sequence[Tensor], share: float, batch_size: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Split images at random into those to learn from and those that are held out; each part keeps its order.

    Args:
        batches: `pixel_values`; their order may be that of the classes.
        share: Share of the images to hold out, in (0, 1).
        batch_size: Of the batches to return.
        seed: Of the draw.

    Raises:
        ValueError: if there are fewer than two images.
    """
    images = torch.cat(list(batches))
    count = min(max(1, math.ceil(share * len(images))), len(images) - 1)
    if count < 1:
        raise ValueError(
            f"Compensation holds a share of the images out, which needs at least 2; there are {len(images)}. Give more "
            "calibration images."
        )
    is_held_out = torch.zeros(len(images), dtype=torch.bool)
    is_held_out[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]] = True
    return list(images[~is_held_out].split(batch_size)), list(images[is_held_out].split(batch_size))


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


def output_error(outputs: Sequence[ModelOutput], references: Sequence[ModelOutput]) -> float:
    """Mean over images of KL(reference ‖ output) in nats, or of the relative squared error of features."""
    errors = []
    for output, reference in zip(outputs, references, strict=True):
        if output.logits is not None and reference.logits is not None:
            errors.append(kl_divergence(reference.logits, output.logits))
        else:
            pairs = zip(reference.features, output.features, strict=True)
            errors.append(torch.stack([relative_error(*pair) for pair in pairs]).mean(dim=0))
    return float(torch.cat([error.double() for error in errors]).mean())


def held_out_error(task: Compensation) -> float:
    """Error of the compressed model, as it is now, on the held-out images; see `output_error`."""
    return output_error(model_outputs(task.model, task.held_out), task.references)


def compensate_and_keep_the_better(compensator: Compensator, task: Compensation) -> CompensationResult:
    """Run a compensator; put everything back where the error on the held-out images did not fall.

    Args:
        compensator: What to run.
        task: What to run it on.
    """
    before = held_out_error(task)
    modes = {name: module.training for name, module in task.model.named_modules()}
    backup = _Backup(task.model)
    details = compensator.compensate(task)
    after = held_out_error(task)
    kept = after < before
    if not kept:
        backup.restore(task.model)
    for name, module in task.model.named_modules():
        # New layers were made while the model was in evaluation mode.
        module.training = modes[name]
    return CompensationResult(compensator.name, kept, before, after, details)


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
