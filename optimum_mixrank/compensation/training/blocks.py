"""Block output reconstruction: train the factors of one block at a time to reproduce the output of the original block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.factorize import share_model
from ...runtime.distributed import Processes
from ...runtime.forward import evaluation_mode
from ..compensator import COMPENSATORS, CompensationTask, Compensator
from ..routes import find_route
from ..segments import Call, SegmentReplay, first_tensor
from .balanced import balanced_factors
from .groups import factor_groups, vector_group
from .loop import Trainer
from .relative import relative_loss, squared_error, token_variance


@COMPENSATORS.register
class BlockCompensator(Compensator):
    """Trains the factors of each block (or stage), in forward order, to restore the original residual stream after it.

    A block gets the inputs that it has in the compressed model; its target is the output of the original block for the
    original inputs. The loss is the squared error relative to the variance of the target. Every block keeps the state
    with the lowest held-out error.

    Memory: the activations at one block boundary of both models. Several processes share every batch, and each stores
    its share. Time: a forward and backward pass of the compressed model per epoch, and two more passes of both models.
    """

    name = "blocks"
    shares_images = True

    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        config, processes = task.config, task.processes
        names = [target.name for target in task.factored]
        route = find_route(task.original, names, task.batches, task.call, processes)
        segments = route.segments
        options: dict[str, Any] = {"call": task.call, "own_outputs": route.own_outputs}
        if not segments:
            return {"blocks": 0, "blocks_improved": 0}
        size = config.train_batch_size
        images, held_out = task.all_images(), task.all_held_out()
        steps, tests = images.split(size), held_out.split(size)
        parts = [processes.part(len(batch)) for batch in (*steps, *tests)]
        batches = [batch[part] for batch, (part, _) in zip((*steps, *tests), parts, strict=True)]
        shares = [share for _, share in parts]
        learn = len(steps)
        weights = [share * len(test) / len(held_out) for share, test in zip(shares[learn:], tests, strict=True)]
        improved = 0
        with evaluation_mode(task.original), evaluation_mode(task.model), balanced_factors(task.model) as names:
            factors = factor_groups(task.model, names, images, size, config.seed, processes, task.call)
            with processes.raise_on_all_ranks():
                original = SegmentReplay(task.original, segments, batches, **options)
                compressed = SegmentReplay(task.model, segments, batches, **options)
            for position, segment in enumerate(segments):
                inside = [name for name in names if name.startswith(f"{segment}.")]
                with processes.raise_on_all_ranks():
                    targets = [first_tensor(call(original.segment)) for call in original.calls]
                reconstruction = _Reconstruction(compressed.segment, compressed.calls, targets, shares, processes)
                if inside:
                    groups = [group for name in inside for group in factors[name]]
                    groups.append(vector_group(task.model, inside, compressed.segment))
                    journal = task.journal.part(f"block{position}")
                    # The "images" are whole batches, whose activations are stored as they were computed.
                    trainer = Trainer(compressed.segment, groups, config, 1, f"Training {segment}", processes, journal)
                    progress = trainer.train(
                        learn,
                        reconstruction.loss,
                        lambda: reconstruction.error(learn, weights),  # noqa: B023
                    )
                    improved += progress.best_epoch > 0
                with processes.raise_on_all_ranks():
                    original.advance()
                    compressed.advance()
        # Not all kernels of a GPU give the same bits every time, and pivots are chosen again.
        share_model(task.model, task.targets, processes)
        return {"blocks": len(segments), "blocks_improved": improved}


@dataclass(frozen=True)
class _Reconstruction:
    """How well a block of the compressed model reproduces targets, batch by batch.

    Each process holds its part of every batch: `shares` says how much of it.
    """

    block: nn.Module
    calls: Sequence[Call]
    targets: Sequence[Tensor]
    shares: Sequence[float]
    processes: Processes

    def loss(self, indices: Tensor) -> Tensor:
        """Return this process's part of the loss of the batch with the given index; see `Trainer.train`."""
        index = int(indices[0])
        with self.processes.raise_on_all_ranks(), self.processes.autocast(self.targets[index].device):
            output = self._output(index)
        return relative_loss(self.targets[index], output, self.shares[index], self.processes)

    @torch.no_grad()
    def error(self, first: int, weights: Sequence[float]) -> float:
        """Return the relative error over all batches from number `first` on, which have these weights."""
        errors = []
        with self.processes.raise_on_all_ranks():
            for index, weight in enumerate(weights, start=first):
                errors.append(weight * float(squared_error(self.targets[index], self._output(index))))
        variance = token_variance(self.targets[first:], weights, self.processes)
        return sum(self.processes.gather(sum(errors))) / float(variance)

    def _output(self, index: int) -> Tensor:
        return first_tensor(self.calls[index](self.block))
