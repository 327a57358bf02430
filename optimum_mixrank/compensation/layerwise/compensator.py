"""Repair layer by layer, in forward order, with the inputs that each layer gets in the compressed model."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor
from transformers.utils import logging

from ...calibration.moments import PairAccumulator, merge_pairs
from ...checkpoint.factorize import make_layers
from ...checkpoint.modeling import FactoredLinear, replace_module
from ...checkpoint.names import Target
from ...runtime.forward import evaluation_mode
from ...runtime.precision import to_float64
from ..compensator import CompensationTask, Compensator
from ..saved_steps import load_layers, save_layers
from ..segments import SegmentReplay, find_segments
from .output_loss import output_loss
from .spilling import spilled
from .structure import Structure
from .targets import OriginalOutputs, inputs_and_targets


PROBED_IMAGES = 4
"""Number of images with which the structure of a segment is determined."""


class LayerwiseCompensator(Compensator):
    """Replaces the factored layers, in forward order, by better ones of the same rank.

    A new layer is computed from two covariances: that of its inputs `x'` in the compressed model, and that of its
    targets in the original model with these inputs.

    Memory: the activations at one segment boundary of both models, for all images and their mirror images, on disk if
    `task.storage` says so; and the outputs of the layers of one segment of the original, about `12 d` values per token
    in a ViT of width d, for as many batches as fit. Time: one pass of the original, two where a segment returns more
    than one tensor; of the compressed model, one pass up to every group of layers that share an input (four in a ViT
    block) and one through the segment. For batches whose outputs are not cached, the original also runs up to every
    group. Several processes share images and layers.

    The progress bar and the report show the error of the layers on the images that they were computed from:
    `E ‖t - Ŵ x' - b‖² / E ‖t - E t‖²` for targets `t`, and `E ‖t - Ŵ x'‖² / E ‖t‖²` for layers without bias.

    Attributes:
        description: Label of the progress bar.
        residual_targets: Whether a layer that writes to the residual stream aims to restore the original stream rather
            than its own original output. It then also corrects errors of its predecessors, as far as `x'` allows.
        outcomes: One word or two on every layer of a segment, which `solve` may append; the report counts them.
    """

    description: ClassVar[str]
    residual_targets: ClassVar[bool]
    shares_images = True
    starts_anew = True
    outcomes: list[str]

    @abstractmethod
    def solve(
        self, task: CompensationTask, target: Target, input_moment: Tensor, target_moment: Tensor
    ) -> FactoredLinear:
        """Return the new layer; its bias is fitted afterwards.

        Args:
            task: The task whose model is compensated.
            target: The original layer, with a weight of shape `[m, n]`.
            input_moment: Covariance of the inputs, or second moment for a layer without bias, `[n, n]`, float64.
            target_moment: The same of targets with inputs, `[m, n]`.
        """

    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        layers = {target.name: target for target in task.factored}
        segments, call = find_segments(task.original, list(layers)), task.config.model_call
        bar = logging.tqdm(total=len(layers), desc=self.description, unit="layer")
        store = spilled(task.storage.on_disk, task.journal.directory, task.processes.index)
        with bar, evaluation_mode(task.original), evaluation_mode(task.model), store as keep:
            batches = _WithMirrored(task.batches) if task.config.mirror else task.batches
            with task.processes.raise_on_all_ranks():
                original = SegmentReplay(task.original, segments, batches, keep["original"], call)
                compressed = SegmentReplay(task.model, segments, batches, keep["compressed"], call)
                # The structure is the same for all images.
                probed = [batch[:PROBED_IMAGES] for batch in task.batches[:1]]
                probe = SegmentReplay(task.original, segments, probed, call=call)
            progress = _resume(task)
            for position, segment in enumerate(segments):
                prefix = f"{segment}."
                inside = {name.removeprefix(prefix): layers[name] for name in layers if name.startswith(prefix)}
                results: Mapping[int, Any] = {}
                if position < progress.segments:
                    bar.update(len(inside))
                else:
                    structure = self._structure(task, probe, list(inside))
                    results = self._solve_segment(task, original, compressed, structure, inside, progress, bar)
                    progress.segments = position + 1
                    _save(task, segments, progress)
                with task.processes.raise_on_all_ranks():
                    original.advance(results)
                    compressed.advance()
                    probe.advance()
        return {
            "layers": len(layers),
            "layers_with_residual_target": progress.residual_targets,
            "layer_errors": progress.errors,
            **({"outcomes": progress.outcomes} if progress.outcomes else {}),
        }

    def _structure(self, task: CompensationTask, probe: SegmentReplay, names: Sequence[str]) -> Structure:
        """Return the structure of the current segment as seen by the first process that has images."""
        own = None
        with task.processes.raise_on_all_ranks():
            for call in probe.calls:
                own = Structure.of(probe.segment, call, names, self.residual_targets)
        return next(each for each in task.processes.gather(own) if each is not None)

    def _solve_segment(
        self,
        task: CompensationTask,
        original: SegmentReplay,
        compressed: SegmentReplay,
        structure: Structure,
        inside: Mapping[str, Target],
        progress: _LayerwiseProgress,
        bar: Any,
    ) -> Mapping[int, Any]:
        """Replace the layers of a segment, given by their names within it.

        Returns:
            What the original segment returned, for the batches whose outputs were cached.
        """
        self.outcomes = []
        with task.processes.raise_on_all_ranks():
            outputs = OriginalOutputs(original, list(inside), structure.writes, task.storage.max_output_bytes)
        for group in structure.groups:
            pairs = _accumulate(task, compressed, group, outputs)
            for name, pair in pairs.items():
                if not pair.is_finite:
                    raise ValueError(
                        f"NaN or Inf around layer {inside[name].name!r} while it was solved again; a half-precision model "
                        "may overflow, load it with dtype='float32'."
                    )
            errors = self._replace(task, {inside[name].name: pair for name, pair in pairs.items()})
            progress.errors.update(errors)
            bar.update(len(group))
            bar.set_postfix(error=f"{max(errors.values()):.4g}")
        progress.residual_targets += len(structure.writes)
        progress.outcomes = dict(Counter(progress.outcomes) + Counter(chain(*task.processes.gather(self.outcomes))))
        return outputs.results

    def _replace(self, task: CompensationTask, pairs: Mapping[str, PairAccumulator]) -> dict[str, float]:
        """Replace the layers whose moments are given by module name, and return their errors by canonical name."""
        targets = {target.name: target for target in task.factored if target.name in pairs}

        def solve(target: Target) -> FactoredLinear:
            return self._solve(task, target, pairs[target.name])

        errors = {}
        for name, layer in make_layers(list(targets.values()), solve, task.processes):
            replace_module(task.model, name, layer)
            error = _relative_error(layer, pairs[name])
            if not math.isfinite(error):
                raise ValueError(
                    f"Layer {name!r} holds NaN or Inf as {layer.factor_a.weight.dtype} after it was solved again; load the "
                    "model with dtype='float32'."
                )
            errors[targets[name].canonical_name] = max(0.0, error)
        return errors

    def _solve(self, task: CompensationTask, target: Target, pair: PairAccumulator) -> FactoredLinear:
        has_bias = target.module.bias is not None
        weight = to_float64(target.module.weight)
        input_moment, target_moment = (moment.to(weight) for moment in pair.moments(centred=has_bias))
        layer = self.solve(task, target, input_moment, target_moment)
        if has_bias:
            input_mean, target_mean = (mean.to(weight) for mean in pair.means())
            # With the factors as they are stored, so that the bias also absorbs the mean of their rounding errors.
            layer.set_bias(target_mean - layer.product() @ input_mean)
        return layer


@dataclass(frozen=True)
class _WithMirrored:
    """Batches followed by their mirror images, which take no memory since they are made again at each iteration."""

    batches: Sequence[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        for batch in self.batches:
            yield batch.flip(-1)


@dataclass
class _LayerwiseProgress:
    """Results so far: the number of finished segments, of layers whose target was the residual stream, and so on.

    Errors of layers are given by canonical name, and outcomes with the number of layers that had each.
    """

    segments: int = 0
    residual_targets: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)


def _resume(task: CompensationTask) -> _LayerwiseProgress:
    """Put the layers saved by an interrupted compression into the model, and return its results."""
    progress = _LayerwiseProgress()
    values = load_layers(task.journal, "layers", task.model, task.targets, task.processes)
    return progress if values is None else _LayerwiseProgress(**{name: values[name] for name in vars(progress)})


def _save(task: CompensationTask, segments: Sequence[str], progress: _LayerwiseProgress) -> None:
    """Save the finished layers if a new entry of the journal is due."""
    with task.processes.raise_on_all_ranks():
        if task.journal.due():
            prefixes = tuple(f"{segment}." for segment in segments[: progress.segments])
            finished = [target.name for target in task.factored if target.name.startswith(prefixes)]
            save_layers(task.journal, "layers", task.model, finished, dataclasses.asdict(progress))


def _accumulate(
    task: CompensationTask, compressed: SegmentReplay, group: Sequence[str], outputs: OriginalOutputs
) -> dict[str, PairAccumulator]:
    """Return the moments of inputs and targets of layers that share an input, over the images of all processes."""
    pairs: dict[str, PairAccumulator] = {}
    for name in group:
        pairs[name] = PairAccumulator(next(iter(pairs.values()), None))
    with task.processes.raise_on_all_ranks():
        for index, call in enumerate(compressed.calls):
            original = outputs.of(index, group)
            inputs, targets = inputs_and_targets(compressed.segment, call, group, outputs.writes, original)
            for name, pair in pairs.items():
                pair.update(inputs[name], targets[name])
    merge_pairs(list(pairs.values()), task.processes)
    return pairs


def _relative_error(layer: FactoredLinear, pair: PairAccumulator) -> float:
    """Return the error of a layer whose bias is fitted, 0 if its targets are constant; rounding may make it negative."""
    centred = layer.bias is not None
    product = layer.product()
    power = float(pair.target_power(centred))
    loss = float(output_loss(product, *(moment.to(product) for moment in pair.moments(centred))))
    return 1 + loss / power if power > 0 else 0.0
