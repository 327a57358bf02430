"""Distillation of the whole model from the original, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.factorize import share_model
from ...runtime.forward import evaluation_mode, fast_attention_for_training, placement
from ...runtime.hooks import hooks_removed_on_exit
from ...runtime.inputs import ModelInputs
from ...runtime.outputs import ModelCall, ModelOutput
from ..compensator import COMPENSATORS, CompensationTask, Compensator
from ..held_out import held_out_error
from .augmentation import Views, augment
from .balanced import balanced_factors
from .groups import factor_groups, vector_group
from .loop import Trainer
from .relative import relative_loss


@COMPENSATORS.register
class DistillationCompensator(Compensator):
    """Trains the factors, biases and normalizations of the encoder to predict what the original predicts.

    The loss of an image is `KL(original ‖ compressed)` in nats plus `feature_weight` times the relative squared error
    of the last hidden state over all tokens; KL is the mean over pixels, tokens or boxes where each has a distribution,
    and without any distribution there are the feature terms alone. Few images are the limit, so
    each looks different every time: both models see the same random views, see `Views`, cropped from images
    `view_scale` times as large as the model sees where the source has them. The state with the lowest held-out error is
    kept.

    Memory: all images on the host, in float16 and `view_scale` times as large on each side, twice while they are
    decoded; gradients, two moments and one copy of the trained parameters, and the activations of a batch.
    Time: a forward pass of the original and a forward and backward pass of the compressed model per epoch.

    Several processes share every batch and sum their gradients, so the result is that of one process up to rounding.
    Each holds all images, since batches are drawn from all of them.

    Args:
        feature_weight: Weight of the feature term.
        views: How much views differ from their images.
    """

    name = "distillation"
    shares_images = True
    uses_high_resolution = True

    def __init__(self, feature_weight: float = 1.0, views: Views = Views()) -> None:  # noqa: B008 - immutable
        self.feature_weight = feature_weight
        self.views = views

    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        config, processes = task.config, task.processes
        images, larger = task.all_images(), task.all_high_resolution()
        source = images if larger is None else ModelInputs(larger)
        count = len(images)
        # Views are made of whole images; of patches, clips and sounds every one is seen as it is.
        size = (images.main.shape[-2], images.main.shape[-1]) if images.is_images else None
        batch_size = min(config.train_batch_size, count)
        generator = torch.Generator().manual_seed(config.seed)

        def loss(indices: Tensor) -> Tensor:
            part, share = processes.part(len(indices))
            batch = source[indices]
            if size is None:
                return self._loss(task, batch[part], share)
            return self._loss(task, ModelInputs(augment(batch.main, size, generator, self.views, part)), share)

        with evaluation_mode(task.original), evaluation_mode(task.model), balanced_factors(task.model) as names:
            factors = factor_groups(task.model, names, images, batch_size, config.seed, processes, task.call)
            vectors = vector_group(task.model, names, getattr(task.model, "base_model", task.model))
            # Memory is freed here if views come from larger images.
            del images
            groups = [vectors, *(group for pair in factors.values() for group in pair)]
            with fast_attention_for_training(task.original, task.model):
                trainer = Trainer(
                    task.model, groups, config, batch_size, "Distilling", processes, task.journal, [generator]
                )
                progress = trainer.train(count, loss, lambda: held_out_error(task))
        # Not all kernels of a GPU give the same bits every time, and pivots are chosen again.
        share_model(task.model, task.targets, processes)
        return {
            "epochs": config.epochs,
            "best_epoch": progress.best_epoch,
            "losses": progress.losses,
            "errors": progress.errors,
        }

    def _loss(self, task: CompensationTask, inputs: ModelInputs, share: float) -> Tensor:
        """Return the part of a batch's loss that comes from a share of its images."""
        device = next(task.model.parameters()).device
        with task.processes.raise_on_all_ranks(), task.processes.autocast(device):
            with torch.no_grad():
                original, original_features = _run(task.original, inputs, task.call)
            compressed, compressed_features = _run(task.model, inputs, task.call)
        total = torch.zeros((), device=device)
        if compressed.logits is not None and original.logits is not None:
            log_q = compressed.logits.float().log_softmax(dim=-1)
            log_p = original.logits.float().log_softmax(dim=-1)
            total = share * nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        for reference, found in zip(original.distributions, compressed.distributions, strict=True):
            divergence = _place_divergence(reference.float(), found.float())
            total = total + share * divergence.to(total.device) / len(original.distributions)
        features = list(zip(original.features, compressed.features, strict=True))
        if original_features is not None and compressed_features is not None:
            features.append((original_features, compressed_features))
        for reference, feature in features:
            loss = relative_loss(reference, feature, share, task.processes)
            total = total + self.feature_weight * loss.to(total.device) / len(features)
        return total


def _place_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return the mean of KL(reference ‖ logits) over images and places."""
    log_q = logits.log_softmax(dim=-1).flatten(0, -2)
    log_p = reference.log_softmax(dim=-1).flatten(0, -2)
    return nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _run(model: nn.Module, inputs: ModelInputs, call: ModelCall) -> tuple[ModelOutput, Tensor | None]:
    """Return the output of a model and the last hidden state of its encoder, `[batch, ..., width]`, if there is one."""
    hidden: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[object, ...], output: Any) -> None:
        state = output.get("last_hidden_state") if isinstance(output, Mapping) else None
        if state is not None:
            hidden.append(state)

    # `output_hidden_states=True` would leave Transformers' own hooks on the model.
    handle = getattr(model, "base_model", model).register_forward_hook(hook)
    with hooks_removed_on_exit([handle]):
        output = call(model, inputs.to(*placement(model)))
    return output, hidden[0] if hidden else None
