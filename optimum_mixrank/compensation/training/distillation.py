"""Whole-model distillation from the original, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.factorize import share_model
from ...runtime.forward import evaluation_mode, fast_attention_for_training
from ...runtime.hooks import hooks_removed_on_exit
from ...runtime.outputs import ModelOutput, select_output
from ..compensator import COMPENSATORS, CompensationTask, Compensator
from ..held_out import held_out_error
from .augmentation import Views, augment
from .balanced import balanced_factors
from .groups import factor_groups, vector_group
from .loop import Trainer, TrainingSettings
from .relative import relative_loss


@COMPENSATORS.register
class DistillationCompensator(Compensator):
    """Trains factors, biases and normalizations of the encoder to predict what the original predicts.

    The loss of an image is `KL(original ‖ compressed)` in nats plus `feature_weight` times the relative squared error
    of the last hidden state over all tokens; without a class head the features alone. The original sees the same views
    of the images, see `Views`: few images are the limit, so each is to look different every time, and views are drawn
    from images `view_scale` times as large as the model sees, where the source has them. The state with the lowest
    held-out error is kept.

    Memory: all images, in float16 and `view_scale` times as large on each side, twice while they are decoded; gradients,
    two moments and one copy of the trained parameters, and the activations of a batch.
    Time: per epoch a forward pass of the original and a forward and backward pass of the compressed model.

    Several processes share every batch out and sum their gradients, so that the result is that of one process up to
    rounding. Each holds all images on the host, since batches are drawn from all of them.

    Args:
        feature_weight: Weight of the feature term.
        views: How strongly views differ from their images.
    """

    name = "distillation"
    shares_images = True
    uses_high_resolution = True

    def __init__(self, feature_weight: float = 1.0, views: Views = Views()) -> None:  # noqa: B008 - it is immutable
        self.feature_weight = feature_weight
        self.views = views

    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        config = task.config
        processes = task.processes
        images, larger = task.all_images(), task.all_high_resolution()
        high_resolution = images if larger is None else larger
        count, size = len(images), (images.shape[-2], images.shape[-1])
        settings = TrainingSettings(
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            batch_size=min(config.train_batch_size, count),
            seed=config.seed,
        )
        generator = torch.Generator().manual_seed(config.seed)

        def loss(indices: Tensor) -> Tensor:
            part, share = processes.part(len(indices))
            return self._loss(task, augment(high_resolution[indices], size, generator, self.views, part), share)

        with evaluation_mode(task.original), evaluation_mode(task.model), balanced_factors(task.model) as names:
            factors = factor_groups(task.model, names, images, settings.batch_size, config.seed, processes)
            vectors = vector_group(task.model, names, getattr(task.model, "base_model", task.model))
            # Beside larger ones they are not needed any more.
            del images
            groups = [vectors, *(group for pair in factors.values() for group in pair)]
            with fast_attention_for_training(task.original, task.model):
                trainer = Trainer(task.model, groups, settings, "Distilling", processes, task.journal, [generator])
                history = trainer.train(count, loss, lambda: held_out_error(task))
        # Not all kernels of a GPU give the same bits every time, and pivots are chosen anew.
        share_model(task.model, task.targets, processes)
        return {
            "epochs": settings.epochs,
            "best_epoch": history.best_epoch,
            "losses": list(history.losses),
            "errors": list(history.errors),
        }

    def _loss(self, task: CompensationTask, pixel_values: Tensor, share: float) -> Tensor:
        """The part that a share of a batch has in the loss of the batch."""
        with task.processes.raise_on_all_ranks():
            device = next(task.model.parameters()).device
            with task.processes.autocast(device):
                with torch.no_grad():
                    original, original_features = _run(task.original, pixel_values)
                compressed, compressed_features = _run(task.model, pixel_values)
        total = torch.zeros((), device=device)
        if compressed.logits is not None and original.logits is not None:
            log_q = compressed.logits.float().log_softmax(dim=-1)
            log_p = original.logits.float().log_softmax(dim=-1)
            total = share * nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        features = list(zip(original.features, compressed.features, strict=True))
        if original_features is not None and compressed_features is not None:
            features.append((original_features, compressed_features))
        for reference, feature in features:
            loss = relative_loss(reference, feature, share, task.processes)
            total = total + self.feature_weight * loss.to(total.device) / len(features)
        return total


def _run(model: nn.Module, pixel_values: Tensor) -> tuple[ModelOutput, Tensor | None]:
    """What the model says, and the last hidden state of its encoder, `[batch, ..., width]`."""
    hidden: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[object, ...], output: Any) -> None:
        state = output.get("last_hidden_state") if isinstance(output, Mapping) else None
        if state is not None:
            hidden.append(state)

    # `output_hidden_states=True` would leave hooks of Transformers' own on the model.
    handle = getattr(model, "base_model", model).register_forward_hook(hook)
    parameter = next(model.parameters())
    with hooks_removed_on_exit([handle]):
        output = model(pixel_values=pixel_values.to(parameter.device, parameter.dtype))
    return select_output(output, getattr(model, "config", None)), hidden[0] if hidden else None
