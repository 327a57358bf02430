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

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.moments import PairAccumulator
from ..hooks import removed_afterwards
from ..inference import evaluation_mode
from ..memory_plan import KEPT_OUTPUTS
from ..messages import get_logger
from ..modeling import FactoredLinear, replace_module, to_float64
from ..stages import make_layers
from ..targets import Target
from .anchors import find_anchors
from .compensator import Compensation, Compensator
from .mirrored import WithMirrored
from .output_loss import output_loss
from .saved_steps import load_layers, save_layers
from .segments import Call, SegmentReplay, SegmentRun, find_segments, run_segment
from .spilling import spilled


logger = get_logger(__name__)

PROBED_IMAGES = 4
"""Images on which anchors and shared inputs are looked for."""


class LayerwiseCompensator(Compensator):
    """Goes through the factored layers in forward order and replaces each by a better one of the same rank.

    A layer's new version is made from the covariances of its inputs in the compressed model, `x'`, and of its targets
    in the original one with them.

    Memory: the activations at one segment boundary of both models, for all images and their mirror images, which are
    announced in the log before the work starts, and lie on the disk where `task.spills` says so; and the outputs of the
    linear layers of one segment of the original, about `12 d` values per token in a ViT of width d, for as many batches as
    `max_bytes` hold. Time: one run of the original, two where a segment returns more than one tensor, and of the
    compressed model one run to every group of layers that share an input (four in a ViT block) and one through the
    segment. For batches whose outputs are not kept, the original runs to every group of layers too. Several processes
    share images and layers out.

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
    max_bytes: ClassVar[int] = KEPT_OUTPUTS

    outcomes: list[str]

    @abstractmethod
    def solve(self, task: Compensation, target: Target, input_moment: Tensor, target_moment: Tensor) -> FactoredLinear:
        """The new layer; its bias is fitted afterwards.

        Args:
            task: What is worked on.
            target: The original layer, of shape `[m, n]`.
            input_moment: Covariance of the inputs, or their second moment for a layer without bias, `[n, n]`, float64.
            target_moment: The same of targets with inputs, `[m, n]`.
        """

    def compensate(self, task: Compensation) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        layers = {target.name: target for target in task.factored}
        segments = find_segments(task.original, list(layers))
        batches = WithMirrored(task.batches) if task.config.mirror else task.batches
        processes = task.processes
        source = 0 if processes.is_alone else processes.first_holder(task.numbers[0] if task.numbers else None)
        assert source is not None  # there is an image to learn from
        progress = logging.tqdm(total=len(layers), desc=self.description, unit="layer")
        store = spilled(task.spills, task.journal.directory, processes.index)
        with progress, evaluation_mode(task.original), evaluation_mode(task.model), store as keep:
            with processes.agreed():
                theirs = SegmentReplay(task.original, segments, batches, keep["original"])
                ours = SegmentReplay(task.model, segments, batches, keep["compressed"])
                # Where layers stand is the same for all images.
                few = [batch[:PROBED_IMAGES] for batch in task.batches[:1]] if processes.index == source else []
                probe = SegmentReplay(task.original, segments, few)
            logger.debug(f"Activations at a segment boundary take {2 * theirs.num_bytes / 2**20:,.0f} MiB of memory.")
            so_far = self._resume(task)
            for position, segment in enumerate(segments):
                inside = {
                    name.removeprefix(f"{segment}."): target
                    for name, target in layers.items()
                    if name.startswith(f"{segment}.")
                }
                results: Mapping[int, Any] = {}
                if position < so_far.segments:
                    progress.update(len(inside))
                else:
                    self.outcomes = []
                    results = self._solve_segment(task, theirs, ours, probe, inside, source, progress, so_far)
                    so_far.segments = position + 1
                    so_far.outcomes = dict(Counter(so_far.outcomes) + Counter(chain(*processes.gather(self.outcomes))))
                    with processes.agreed():
                        if task.journal.due():
                            made = _layers_in(task, segments[: position + 1])
                            save_layers(task.journal, "layers", task.model, made, dataclasses.asdict(so_far))
                with processes.agreed():
                    theirs.advance(results)
                    ours.advance()
                    probe.advance()
        return {
            "layers": len(layers),
            "layers_with_residual_target": so_far.anchored,
            "layer_errors": so_far.errors,
            **({"outcomes": so_far.outcomes} if so_far.outcomes else {}),
        }

    def _resume(self, task: Compensation) -> _SoFar:
        """Put the layers in that were made before the run was cut off, and say what had come of them."""
        values = load_layers(task.journal, "layers", task.model, task.targets, task.processes)
        return _SoFar() if values is None else _SoFar(**{field: values[field] for field in _SoFar().__dict__})

    def _solve_segment(
        self,
        task: Compensation,
        theirs: SegmentReplay,
        ours: SegmentReplay,
        probe: SegmentReplay,
        inside: Mapping[str, Target],
        source: int,
        progress: Any,
        so_far: _SoFar,
    ) -> Mapping[int, Any]:
        """Replace the layers of a segment, given by their names in it.

        Returns:
            What the original segment gave for the batches that were kept.
        """
        processes = task.processes
        structure: tuple[dict[str, str], list[list[str]]] = {}, []
        with processes.agreed():
            if processes.index == source:
                structure = self._structure(probe, list(inside))
        anchors, groups = processes.broadcast(structure, source)
        with processes.agreed():
            outputs = _OriginalOutputs(theirs, list(inside), anchors, min(self.max_bytes, task.kept_outputs))
        for group in groups:
            errors = self._replace(task, ours, {name: inside[name] for name in group}, anchors, outputs, source)
            so_far.errors.update(errors)
            progress.update(len(group))
            progress.set_postfix(error=f"{max(errors.values()):.4g}")
        so_far.anchored += len(anchors)
        return outputs.results

    def _structure(self, replay: SegmentReplay, names: Sequence[str]) -> tuple[dict[str, str], list[list[str]]]:
        """Anchors of the layers of a segment, and which of them share an input."""
        call = replay.calls[0]
        anchors = find_anchors(replay.segment, call, names) if self.residual_targets else {}
        return anchors, group_by_input(replay.segment, call, names)

    def _replace(
        self,
        task: Compensation,
        ours: SegmentReplay,
        group: Mapping[str, Target],
        anchors: Mapping[str, str],
        wanted: _OriginalOutputs,
        source: int,
    ) -> dict[str, float]:
        """Replace layers that share an input; their errors, by canonical name."""
        processes = task.processes
        pairs: dict[str, PairAccumulator] = {}
        for name in group:
            pairs[name] = PairAccumulator(next(iter(pairs.values()), None))

        def take_in(indices: range) -> None:
            for index in indices:
                original = wanted.of(index, list(group))
                inputs, targets = _inputs_and_targets(ours.segment, ours.calls[index], list(group), anchors, original)
                for name, pair in pairs.items():
                    pair.update(inputs[name], targets[name])

        # One process takes in the first of all batches, and the others start from its shifts.
        first = 1 if processes.index == source else 0
        with processes.agreed():
            take_in(range(first))
        if not processes.is_alone:
            for pair in pairs.values():
                pair.shifts = processes.send(pair.shifts, source)
        with processes.agreed():
            take_in(range(first, len(ours.calls)))
        for name, pair in pairs.items():
            pair.reduce(processes)
            if not pair.is_finite:
                raise ValueError(
                    f"NaN or Inf around layer {group[name].name!r} while it was solved again; a half-precision model may "
                    "overflow, load it with dtype='float32'."
                )
        by_target = {group[name].name: pair for name, pair in pairs.items()}
        canonical = {target.name: target.canonical_name for target in group.values()}
        errors = {}
        for name, layer in make_layers(
            list(group.values()), lambda target: self._solve(task, target, by_target[target.name]), processes
        ):
            replace_module(task.model, name, layer)
            error = _relative_error(layer, by_target[name])
            if not math.isfinite(error):
                raise ValueError(
                    f"Layer {name!r} holds NaN or Inf as {layer.factor_a.weight.dtype} after it was solved again; load the "
                    "model with dtype='float32'."
                )
            errors[canonical[name]] = max(0.0, error)
        return errors

    def _solve(self, task: Compensation, target: Target, pair: PairAccumulator) -> FactoredLinear:
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
class _SoFar:
    """What has come of the layers up to now.

    Attributes:
        segments: That are done.
        anchored: Layers that were to restore the residual stream.
        errors: Of layers, by canonical name.
        outcomes: How many layers had each.
    """

    segments: int = 0
    anchored: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)


def _relative_error(layer: FactoredLinear, pair: PairAccumulator) -> float:
    """Of a layer whose bias, if it has one, is fitted; up to rounding not below 0, which targets that never change have."""
    centred = layer.bias is not None
    product = layer.product()
    power = float(pair.target_power(centred))
    loss = float(output_loss(product, *(moment.to(product) for moment in pair.moments(centred))))
    return 1 + loss / power if power > 0 else 0.0


def _layers_in(task: Compensation, segments: Sequence[str]) -> list[str]:
    """The factored layers in some segments."""
    return [
        target.name for target in task.factored if any(target.name.startswith(f"{segment}.") for segment in segments)
    ]


def group_by_input(segment: nn.Module, call: Call, names: Sequence[str]) -> list[list[str]]:
    """Layers of a segment in the order in which they are called, those that get the very same tensor together.

    Raises:
        ValueError: if a layer is called more than once, or not at all.
    """
    calls: list[tuple[str, Tensor]] = []
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            calls.append((name, args[0]))

        handles.append(segment.get_submodule(name).register_forward_pre_hook(hook))
    with removed_afterwards(handles), torch.no_grad():
        call(segment)
    called = [name for name, _ in calls]
    for name in names:
        if called.count(name) != 1:
            raise ValueError(
                f"Layer {name!r} is called {called.count(name)} times in a forward pass, so it cannot be solved in "
                "sequence. Leave it out with exclude_modules, or leave layer-wise steps out of compensation."
            )
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, tensor in calls:
        if tensor is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = tensor
    return groups


class _OriginalOutputs:
    """What the original gives for every batch: kept for as many batches as fit, computed again each time for others."""

    def __init__(
        self, replay: SegmentReplay, names: Sequence[str], anchors: Mapping[str, str], max_bytes: int
    ) -> None:
        self._replay = replay
        self._anchors = anchors
        self._kept: list[dict[str, Tensor]] = []
        self.results: dict[int, Any] = {}
        """What the segment itself returned, by batch, where that is one tensor, which is kept as a target anyway."""
        room = max_bytes
        for index, call in enumerate(replay.calls):
            found, run = _wanted(replay.segment, call, names, anchors)
            room -= sum(tensor.numel() * tensor.element_size() for tensor in found.values())
            if room < 0:
                break
            self._kept.append(found)
            if isinstance(run.result, Tensor) or (isinstance(run.result, tuple) and len(run.result) == 1):
                self.results[index] = run.result

    def of(self, index: int, names: Sequence[str]) -> Mapping[str, Tensor]:
        """By layer, for the batch with this index."""
        if index < len(self._kept):
            return self._kept[index]
        anchors = {name: place for name, place in self._anchors.items() if name in names}
        return _wanted(self._replay.segment, self._replay.calls[index], names, anchors)[0]


def _wanted(
    segment: nn.Module, call: Call, names: Sequence[str], anchors: Mapping[str, str]
) -> tuple[dict[str, Tensor], SegmentRun]:
    """What the original gives for one batch, by layer: its output, or the residual stream at its anchor; and the run."""
    modules = sorted({place for place in anchors.values() if place})
    outputs = [name for name in names if name not in anchors] + ([""] if "" in anchors.values() else [])
    run = run_segment(segment, call, modules, outputs)
    wanted = {
        name: _at(anchors[name], run.inputs, run.outputs) if name in anchors else run.outputs[name] for name in names
    }
    return wanted, run


def _inputs_and_targets(
    segment: nn.Module, call: Call, names: Sequence[str], anchors: Mapping[str, str], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of our layers, and what their outputs should be, for one batch."""
    places = {name: anchors[name] for name in names if name in anchors}
    modules = sorted({place for place in places.values() if place})
    outputs = [*places, *([""] if "" in places.values() else [])]
    run = run_segment(segment, call, [*names, *modules], outputs)
    streams, given = run.inputs, run.outputs
    # What the stream holds beside our layer's own output stays; the layer is to add the rest.
    targets = {
        name: wanted[name] - (_at(places[name], streams, given) - given[name]) if name in places else wanted[name]
        for name in names
    }
    return {name: streams[name] for name in names}, targets


def _at(place: str, streams: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
    """The residual stream at the input of a module, or as the output of the segment."""
    return streams[place] if place else given[place]
