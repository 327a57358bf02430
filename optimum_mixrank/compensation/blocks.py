"""Block output reconstruction: train the factors of one block at a time on what the original block gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..inference import evaluation_mode
from .compensator import COMPENSATORS, Compensation, Compensator
from .distillation import relative_loss
from .groups import factor_groups, vector_group
from .segments import Call, SegmentReplay, find_segments, first_tensor
from .training import TrainingSettings, balanced_factors, train


@COMPENSATORS.register
class BlockCompensator(Compensator):
    """Trains the factors of each block (or stage) in forward order to restore the original residual stream after it.

    A block gets the inputs that it has in the compressed model; its target is the output of the original block for the
    original inputs. The loss is the squared error relative to the variance of the target. Every block keeps the state
    with the lowest held-out error.

    Memory: the activations at one block boundary of both models. Time: per epoch a forward and backward pass of the
    compressed model, and two passes more of both.
    """

    name = "blocks"

    def compensate(self, task: Compensation) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        config = task.config
        segments = find_segments(task.original, [target.name for target in task.factored])
        # Batches are the units here, since the inputs of a block are kept as they come.
        size = config.train_batch_size
        steps = torch.cat(list(task.batches)).split(size)
        batches = [*steps, *torch.cat(list(task.held_out)).split(size)]
        learn, settings = len(steps), TrainingSettings(config.epochs, config.learning_rate, 1, config.seed)
        improved = []
        with evaluation_mode(task.original), evaluation_mode(task.model), balanced_factors(task.model) as names:
            factors = factor_groups(task.model, names, torch.cat(list(task.batches)), size, config.seed)
            theirs = SegmentReplay(task.original, segments, batches)
            ours = SegmentReplay(task.model, segments, batches)
            for segment in segments:
                inside = [name for name in names if name.startswith(f"{segment}.")]
                wanted = [first_tensor(call(theirs.segment)) for call in theirs.calls]
                block = ours.segment

                def loss(indices: Tensor, calls: list[Call] = ours.calls, wanted: list[Tensor] = wanted) -> Tensor:
                    index = int(indices[0])
                    return relative_loss(wanted[index], first_tensor(calls[index](block)))  # noqa: B023

                def error(calls: list[Call] = ours.calls, wanted: list[Tensor] = wanted) -> float:
                    with torch.no_grad():
                        pairs = list(zip(wanted, calls, strict=True))[learn:]
                        errors = [float(relative_loss(w, first_tensor(c(block)))) * len(w) for w, c in pairs]  # noqa: B023
                        return sum(errors) / sum(len(w) for w, _ in pairs)

                if inside:
                    groups = [group for name in inside for group in factors[name]]
                    groups.append(vector_group(task.model, inside, block))
                    history = train(block, groups, learn, loss, error, settings, f"Training {segment}")
                    improved.append(history.best_epoch > 0)
                theirs.advance()
                ours.advance()
        return {"blocks": len(segments), "blocks_improved": sum(improved)}
