"""Repair layer by layer, in forward order, with the inputs that each layer really gets."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
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
from ..compensator import MAX_CACHED_OUTPUT_BYTES, CompensationTask, Compensator
from ..saved_steps import load_layers, save_layers
from ..segments import SegmentReplay, find_segments
from .mirrored import WithMirrored
from .output_loss import output_loss
from .spilling import spilled
from .structure import Structure
from .targets import OriginalOutputs, inputs_and_targets


PROBED_IMAGES = 4
"""Images on which the structure of a segment is looked at."""


class LayerwiseCompensator(Compensator):
    """Goes through the factored layers in forward order and replaces each by a better one of the same rank.

    A layer's new version is made from the covariances of its inputs in the compressed model, `x'`, and of its targets
    in the original one with them.

    Memory: the activations at one segment boundary of both models, for all images and their mirror images, on the disk
    where `task.storage` says so; and the outputs of the linear layers of one segment of the original, about `12 d` values
    per token in a ViT of width d, for as many batches as fit. Time: one run of the original, two where a segment returns
    more than one tensor, and of the compressed model one run to every group of layers that share an input (four in a ViT
    block) and one through the segment. For batches whose outputs are not kept, the original runs to every group of
    layers too. Several processes share images and layers out.

    The progress bar and the report give the error of the layers on the images that they were made from:
    `E ‖t - Ŵ x' - b‖² / E ‖t - E t‖²` for targets `t`, and `E ‖t - Ŵ x'‖² / E ‖t‖²` of layers without bias.

    Attributes:
        description: Of the progress bar.
        residual_targets: Whether a layer that writes to the residual stream is to restore the original stream, rather
            than its own original output: what its predecessors have done wrong is then corrected as far as `x'` tells.
        max_bytes: Up to which the original's outputs of a segment are kept.
        outcomes: What `solve` says of the layers that it has made, for the report to count; a subclass may add to it.
    """

    description: ClassVar[str]
    residual_targets: ClassVar[bool]
    shares_images = True
    starts_anew = True
    max_bytes: ClassVar[int] = MAX_CACHED_OUTPUT_BYTES

    outcomes: list[str]

    @abstractmethod
    def solve(
        self, task: CompensationTask, target: Target, input_moment: Tensor, target_moment: Tensor
    ) -> FactoredLinear:
        """The new layer; its bias is fitted afterwards.

        Args:
            task: What is worked on.
            target: The original layer, of shape `[m, n]`.
            input_moment: Covariance of the inputs, or their second moment for a layer without bias, `[n, n]`, float64.
            target_moment: The same of targets with inputs, `[m, n]`.
        """

    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        layers = {target.name: target for target in task.factored}
        segments = find_segments(task.original, list(layers))
        bar = logging.tqdm(total=len(layers), desc=self.description, unit="layer")
        store = spilled(task.storage.on_disk, task.journal.directory, task.processes.index)
        with bar, evaluation_mode(task.original), evaluation_mode(task.model), store as keep:
            batches = WithMirrored(task.batches) if task.config.mirror else task.batches
            with task.processes.raise_on_all_ranks():
                original = SegmentReplay(task.original, segments, batches, keep["original"])
                compressed = SegmentReplay(task.model, segments, batches, keep["compressed"])
                # The structure is the same for all images.
                probe = SegmentReplay(task.original, segments, [batch[:PROBED_IMAGES] for batch in task.batches[:1]])
            done = _resume(task)
            for position, segment in enumerate(segments):
                inside = {
                    name.removeprefix(f"{segment}."): target
                    for name, target in layers.items()
                    if name.startswith(f"{segment}.")
                }
                results: Mapping[int, Any] = {}
                if position >= done.segments:
                    structure = self._structure(task, probe, list(inside))
                    results = self._solve_segment(task, original, compressed, structure, inside, done)
                    done.segments = position + 1
                    _save(task, segments, done)
                bar.update(len(inside))
                bar.set_postfix(error=f"{max(done.errors[each.canonical_name] for each in inside.values()):.4g}")
                with task.processes.raise_on_all_ranks():
                    original.advance(results)
                    compressed.advance()
                    probe.advance()
        return {
            "layers": len(layers),
            "layers_with_residual_target": done.residual_targets,
            "layer_errors": done.errors,
            **({"outcomes": done.outcomes} if done.outcomes else {}),
        }

    def _structure(self, task: CompensationTask, probe: SegmentReplay, names: Sequence[str]) -> Structure:
        """The structure of a segment, as the first process sees it that has images."""
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
        done: _LayerwiseProgress,
    ) -> Mapping[int, Any]:
        """Replace the layers of a segment, given by their names in it.

        Returns:
            What the original segment gave for the batches that were kept.
        """
        self.outcomes = []
        room = min(self.max_bytes, task.storage.max_output_bytes)
        with task.processes.raise_on_all_ranks():
            wanted = OriginalOutputs(original, list(inside), structure.writes, room)
        for group in structure.groups:
            pairs = _accumulate(task, compressed, group, structure, wanted)
            for name, pair in pairs.items():
                if not pair.is_finite:
                    raise ValueError(
                        f"NaN or Inf around layer {inside[name].name!r} while it was solved again; a half-precision model "
                        "may overflow, load it with dtype='float32'."
                    )
            done.errors.update(self._replace(task, {inside[name].name: pair for name, pair in pairs.items()}))
        done.residual_targets += len(structure.writes)
        done.outcomes = dict(Counter(done.outcomes) + Counter(chain(*task.processes.gather(self.outcomes))))
        return wanted.results

    def _replace(self, task: CompensationTask, pairs: Mapping[str, PairAccumulator]) -> dict[str, float]:
        """Replace layers, given by their moments; their errors, by canonical name."""
        targets = [target for target in task.factored if target.name in pairs]
        canonical = {target.name: target.canonical_name for target in targets}
        errors = {}
        for name, layer in make_layers(
            targets, lambda target: self._solve(task, target, pairs[target.name]), task.processes
        ):
            replace_module(task.model, name, layer)
            error = _relative_error(layer, pairs[name])
            if not math.isfinite(error):
                raise ValueError(
                    f"Layer {name!r} holds NaN or Inf as {layer.factor_a.weight.dtype} after it was solved again; load the "
                    "model with dtype='float32'."
                )
            errors[canonical[name]] = max(0.0, error)
        return errors

    def _solve(self, task: CompensationTask, target: Target, pair: PairAccumulator) -> FactoredLinear:
        has_bias = target.module.bias is not None
        weight = to_float64(target.module.weight)
        input_moment, target_moment = (moment.to(weight) for moment in pair.moments(centred=has_bias))
        layer = self.solve(task, target, input_moment, target_moment)
        if has_bias:
            input_mean, target_mean = (mean.to(weight) for mean in pair.means())
            # From the factors as they are stored, so that the bias absorbs the mean of their rounding too.
            layer.set_bias(target_mean - layer.product() @ input_mean)
        return layer


@dataclass
class _LayerwiseProgress:
    """What has come of the layers up to now.

    Attributes:
        segments: How many are done.
        residual_targets: Layers that were to restore the residual stream.
        errors: Of layers, by canonical name.
        outcomes: How many layers had each.
    """

    segments: int = 0
    residual_targets: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)


def _resume(task: CompensationTask) -> _LayerwiseProgress:
    """Put the layers in that were made before the run was cut off, and say what had come of them."""
    values = load_layers(task.journal, "layers", task.model, task.targets, task.processes)
    names = [field.name for field in dataclasses.fields(_LayerwiseProgress)]
    return _LayerwiseProgress() if values is None else _LayerwiseProgress(**{name: values[name] for name in names})


def _save(task: CompensationTask, segments: Sequence[str], done: _LayerwiseProgress) -> None:
    """Save the layers that are made, if the last time is long enough ago."""
    with task.processes.raise_on_all_ranks():
        if task.journal.due():
            prefixes = tuple(f"{segment}." for segment in segments[: done.segments])
            made = [target.name for target in task.factored if target.name.startswith(prefixes)]
            save_layers(task.journal, "layers", task.model, made, dataclasses.asdict(done))


def _accumulate(
    task: CompensationTask,
    compressed: SegmentReplay,
    group: Sequence[str],
    structure: Structure,
    wanted: OriginalOutputs,
) -> dict[str, PairAccumulator]:
    """Moments of the inputs and targets of layers that share an input, over the images of all processes."""
    pairs: dict[str, PairAccumulator] = {}
    for name in group:
        pairs[name] = PairAccumulator(next(iter(pairs.values()), None))
    with task.processes.raise_on_all_ranks():
        for index, call in enumerate(compressed.calls):
            inputs, targets = inputs_and_targets(
                compressed.segment, call, group, structure.writes, wanted.of(index, group)
            )
            for name, pair in pairs.items():
                pair.update(inputs[name], targets[name])
    merge_pairs(list(pairs.values()), task.processes)
    return pairs


def _relative_error(layer: FactoredLinear, pair: PairAccumulator) -> float:
    """Of a layer whose bias, if it has one, is fitted.

    Up to rounding it is not below 0, which it is for targets that never change.
    """
    centred = layer.bias is not None
    product = layer.product()
    power = float(pair.target_power(centred))
    loss = float(output_loss(product, *(moment.to(product) for moment in pair.moments(centred))))
    return 1 + loss / power if power > 0 else 0.0
