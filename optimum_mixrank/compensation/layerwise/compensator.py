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

from torch import Tensor, nn
from transformers.utils import logging

from ...calibration.moments import PairAccumulator, merge_pairs
from ...checkpoint.factorize import insert_layer, layer_of, make_layers
from ...checkpoint.modeling import FactoredLinear, new_parameter, replace_module
from ...checkpoint.names import Target
from ...decomposition.mlp import rows_of_units
from ...runtime.forward import evaluation_mode
from ...runtime.inputs import ModelInputs
from ...runtime.precision import to_float64
from ..compensator import CompensationTask, Compensator
from ..routes import Route, find_route
from ..saved_steps import load_layers, save_layers
from ..segments import SegmentReplay
from .output_loss import output_loss
from .places import LayerMoments, Place, find_places
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
        self, task: CompensationTask, place: Place, input_moment: Tensor, target_moment: Tensor
    ) -> FactoredLinear | nn.Linear:
        """Return the new layer, which is dense if the place has no rank; its bias is fitted afterwards.

        Args:
            task: The task whose model is compensated.
            place: What to solve; its target is the original layer, with a weight of shape `[m, n]`.
            input_moment: Covariance of the inputs, or second moment for a layer without bias, `[n, n]`, float64.
            target_moment: The same of targets with inputs, `[m, n]`.
        """

    def choose_units(self, place: Place, hidden_moment: Tensor, target_moment: Tensor) -> Tensor:
        """Return the hidden units that an MLP keeps, ascending, int64, `[place.width]`.

        Args:
            place: The second layer of the MLP, at full width.
            hidden_moment: Covariance or second moment, as in `solve`, of the outputs of the original first layer, `[h, h]`.
            target_moment: That of the targets of the second layer and these units, `[m, h]`.
        """
        raise NotImplementedError(
            f"compensation={self.name!r} cannot choose hidden units; use structures without 'width', or 'sequential'."
        )

    def compensate(self, task: CompensationTask) -> Mapping[str, Any]:
        """See `Compensator.compensate`."""
        route = self._route(task)
        places = _followed(find_places(task), route)
        layers = {layer.name: layer for place in places for layer in place.layers}
        segments, call = route.segments, task.call
        options: dict[str, Any] = {"call": call, "own_outputs": route.own_outputs}
        bar = logging.tqdm(total=len(layers), desc=self.description, unit="layer")
        store = spilled(task.storage.on_disk, task.journal.directory, task.processes.index)
        with bar, evaluation_mode(task.original), evaluation_mode(task.model), store as keep:
            images = task.images_to_solve_from()
            mirrored = task.config.mirror and all(ModelInputs.of(batch).is_images for batch in images)
            batches = _WithMirrored(images) if mirrored else images
            if not layers:
                return {"layers": 0, "layers_with_residual_target": 0, "layer_errors": {}}
            with task.processes.raise_on_all_ranks():
                original = SegmentReplay(task.original, segments, batches, keep["original"], **options)
                compressed = SegmentReplay(task.model, segments, batches, keep["compressed"], **options)
                # The structure is the same for all images.
                probed = [batch[:PROBED_IMAGES] for batch in images[:1]]
                probe = SegmentReplay(task.original, segments, probed, **options)
            progress = _resume(task)
            for position, segment in enumerate(segments):
                prefix = f"{segment}."
                inside = {name.removeprefix(prefix): each for name, each in layers.items() if name.startswith(prefix)}
                results: Mapping[int, Any] = {}
                if position < progress.segments:
                    bar.update(len(inside))
                else:
                    structure = self._structure(task, probe, list(inside))
                    own = [place for place in places if place.layers[0].name.startswith(prefix)]
                    run = _Segment(task, original, compressed, structure, inside, own)
                    results = self._solve_segment(run, progress, bar)
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

    def _route(self, task: CompensationTask) -> Route:
        """Return the segments that can be followed."""
        names = [target.name for target in task.factored]
        return find_route(task.original, names, task.batches, task.call, task.processes)

    def _structure(self, task: CompensationTask, probe: SegmentReplay, names: Sequence[str]) -> Structure:
        """Return the structure of the current segment as seen by the first process that has images."""
        own = None
        with task.processes.raise_on_all_ranks():
            for call in probe.calls:
                own = Structure.of(probe.segment, call, names, self.residual_targets)
        return next(each for each in task.processes.gather(own) if each is not None)

    def _solve_segment(self, run: _Segment, progress: _LayerwiseProgress, bar: Any) -> Mapping[int, Any]:
        """Replace the layers of a segment.

        Returns:
            What the original segment returned, for the batches whose outputs were cached.
        """
        task, structure = run.task, run.structure
        self.outcomes = []
        with task.processes.raise_on_all_ranks():
            outputs = OriginalOutputs(run.original, list(run.inside), structure.writes, task.storage.max_output_bytes)
        units: dict[str, Tensor] = {}
        for group in structure.groups:
            names = {run.inside[name].name for name in group}
            places = [place for place in run.places if names.issuperset(layer.name for layer in place.layers)]
            first = next((place for place in places if place.is_first), None)
            if first is not None:
                pairs = self._narrow(run, first, group, outputs, units)
            else:
                pairs = _accumulate(run, [group], outputs)
            moments = {place.target.name: _moments(place, pairs, units) for place in places}
            narrowed = [place if place.mlp is None else place.with_units(units[place.mlp.name]) for place in places]
            errors = self._replace(task, narrowed, moments)
            progress.errors.update(errors)
            bar.update(len(group))
            bar.set_postfix(error=f"{max(errors.values()):.4g}")
        progress.residual_targets += len(structure.writes)
        progress.outcomes = dict(Counter(progress.outcomes) + Counter(chain(*task.processes.gather(self.outcomes))))
        return outputs.results

    def _narrow(
        self,
        run: _Segment,
        first: Place,
        group: Sequence[str],
        outputs: OriginalOutputs,
        units: dict[str, Tensor],
    ) -> dict[str, PairAccumulator]:
        """Choose the units of an MLP, with its original layers at the drifted inputs; return the pairs of its layers."""
        mlp, task = first.mlp, run.task
        assert mlp is not None  # the place of a first layer belongs to one
        second = next(place for place in run.places if place.mlp is mlp and not place.is_first)
        kept = {place: layer_of(task.model, place.target) for place in (first, second)}
        for target in mlp.layers:
            replace_module(task.model, target.name, target.module)
        following = next(name for name, target in run.inside.items() if target.name == second.target.name)
        try:
            pairs = _accumulate(run, [group, [following]], outputs)
        finally:
            for place, layer in kept.items():
                insert_layer(task.model, place.target, layer, place.chunks)
        moments = _moments(second, pairs, None)
        units[mlp.name] = self.choose_units(second, moments.inputs, moments.targets)
        return pairs

    def _replace(
        self, task: CompensationTask, places: Sequence[Place], moments: Mapping[str, LayerMoments]
    ) -> dict[str, float]:
        """Replace layers, given their moments by module name, and return their errors by canonical name."""
        by_name = {place.target.name: place for place in places}

        def solve(target: Target) -> FactoredLinear | nn.Linear:
            return self._solve(task, by_name[target.name], moments[target.name])

        errors = {}
        for name, layer in make_layers([place.target for place in places], solve, task.processes):
            insert_layer(task.model, by_name[name].original, layer, by_name[name].chunks)
            error = _relative_error(layer, moments[name])
            if not math.isfinite(error):
                raise ValueError(
                    f"Layer {name!r} holds NaN or Inf after it was solved again; load the model with dtype='float32'."
                )
            errors.update({each.canonical_name: max(0.0, error) for each in by_name[name].layers})
        return errors

    def _solve(self, task: CompensationTask, place: Place, moments: LayerMoments) -> FactoredLinear | nn.Linear:
        layer = self.solve(task, place, moments.inputs, moments.targets)
        if layer.bias is not None:
            # With the factors as they are stored, so that the bias also absorbs the mean of their rounding errors.
            bias = moments.target_mean - weight_of(layer) @ moments.input_mean
            if isinstance(layer, nn.Linear):
                layer.bias = new_parameter(bias, layer.bias)
            else:
                layer.set_bias(bias)
        return layer


def _followed(places: Sequence[Place], route: Route) -> list[Place]:
    """Return the places all of whose layers can be followed, with those of the MLP that they belong to."""

    def layers(place: Place) -> set[str]:
        return {layer.name for layer in (*place.layers, *(() if place.mlp is None else place.mlp.layers))}

    segments = tuple(f"{segment}." for segment in route.segments)
    return [
        place
        for place in places
        if not layers(place) & route.left_out and all(name.startswith(segments) for name in layers(place))
    ]


@dataclass(frozen=True)
class _Segment:
    """A segment that is being solved: its layers by their names within it, and its places."""

    task: CompensationTask
    original: SegmentReplay
    compressed: SegmentReplay
    structure: Structure
    inside: Mapping[str, Target]
    places: Sequence[Place]


def _moments(place: Place, pairs: Mapping[str, PairAccumulator], units: Mapping[str, Tensor] | None) -> LayerMoments:
    """Return the moments of a place; of the first layer of an MLP, for the outputs that belong to the units."""
    for layer in place.layers:
        if not pairs[layer.name].is_finite:
            raise ValueError(
                f"NaN or Inf around layer {layer.name!r} while it was solved again; a half-precision model may overflow, "
                "load it with dtype='float32'."
            )
    module = place.target.module
    like = to_float64(module.weight[:0])
    moments = LayerMoments.of([pairs[layer.name] for layer in place.layers], module.bias is not None, like)
    if units is None or place.mlp is None or not place.is_first:
        return moments
    rows = rows_of_units(units[place.mlp.name], module.out_features, place.mlp.num_units)
    return moments.of_rows(rows)


@dataclass(frozen=True)
class _WithMirrored:
    """Batches followed by their mirror images, which take no memory since they are made again at each iteration."""

    batches: Sequence[ModelInputs]

    def __iter__(self) -> Iterator[ModelInputs]:
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
            finished = [target for target in task.factored if target.name.startswith(prefixes)]
            save_layers(task.journal, "layers", task.model, finished, dataclasses.asdict(progress))


def _accumulate(
    run: _Segment, groups: Sequence[Sequence[str]], outputs: OriginalOutputs
) -> dict[str, PairAccumulator]:
    """Return the moments of inputs and targets of layers, by module name, over the images of all processes.

    Args:
        run: The segment.
        groups: Names within the segment of layers that share an input; all groups are seen in one pass.
        outputs: What the original computes.
    """
    names = [name for group in groups for name in group]
    pairs: dict[str, PairAccumulator] = {}
    for group in groups:
        leader: PairAccumulator | None = None
        for name in group:
            pairs[name] = PairAccumulator(leader)
            leader = leader or pairs[name]
    processes = run.task.processes
    with processes.raise_on_all_ranks():
        for index, call in enumerate(run.compressed.calls):
            original = outputs.of(index, names)
            inputs, targets = inputs_and_targets(run.compressed.segment, call, names, outputs.writes, original)
            for name, pair in pairs.items():
                pair.update(inputs[name], targets[name])
    for group in groups:
        merge_pairs([pairs[name] for name in group], processes)
    return {run.inside[name].name: pair for name, pair in pairs.items()}


def weight_of(layer: FactoredLinear | nn.Linear) -> Tensor:
    """Return the weight of a layer, dense or factored, in float64."""
    return to_float64(layer.weight) if isinstance(layer, nn.Linear) else layer.product()


def _relative_error(layer: FactoredLinear | nn.Linear, moments: LayerMoments) -> float:
    """Return the error of a layer whose bias is fitted, 0 if its targets are constant; rounding may make it negative."""
    product = weight_of(layer)
    power = float(moments.target_power.sum())
    loss = float(output_loss(product, moments.inputs.to(product), moments.targets.to(product)))
    return 1 + loss / power if power > 0 else 0.0
