"""Decompose the targeted layers, all at once or group by group, and factorize them at the allocated ranks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..allocation.budget import RankBudget
from ..allocation.choice import LayerChoice
from ..calibration.result import Calibration
from ..calibration.sites import Mlp, SharedInput, Site
from ..calibration.task import CalibrationTask
from ..checkpoint.factorize import factored_linear, insert_layer, make_layers, rank_map_of
from ..checkpoint.names import Target
from ..checkpoint.narrowing import linear_like, selected_rows
from ..checkpoint.rank_map import FactoredLayer, break_even
from ..decomposition import Decomposition, KfacMetric, LayerStatistics, Metric, Statistic
from ..decomposition.mlp import TwoSidedMlp, WidthLosses, rows_of_units
from ..decomposition.statistics import COMPENSATION_STATISTICS
from ..decomposition.width import UnitSelection
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.logging import get_logger
from ..runtime.malloc import trim_heap
from ..runtime.phases import phase
from ..runtime.precision import to_float64


logger = get_logger(__name__)


def check_weights(targets: Sequence[Target]) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: if one is not; the message names the first such layer.
    """
    for target in targets:
        if not torch.isfinite(target.module.weight).all():
            raise ValueError(f"The weight of layer {target.name!r} holds NaN or Inf; the checkpoint is damaged.")


def decompose_layers(
    metric: Metric,
    targets: Sequence[Target],
    calibration: Calibration | None,
    layout: str = "factors",
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Decomposition]:
    """Decompose every layer in float64; return the decompositions by canonical name.

    Only components up to the break-even rank are kept, in float32 or the layer's own precision if that is higher, so
    that they take at most as much memory as the dense weights. Several processes share the layers and exchange results.

    Args:
        metric: Measures the error of a layer.
        targets: The layers.
        calibration: Statistics by module name; None for a metric that uses no data.
        layout: How factors will be stored, on which the break-even rank depends.
        processes: The processes that share the work.

    Raises:
        ValueError: if the calibration lacks a layer or a statistic.
    """
    owners = processes.balance_tasks({target.name: math.prod(target.shape) * min(target.shape) for target in targets})
    own = [target for target in targets if owners[target.name] == processes.index]
    found: dict[str, Decomposition] = {}
    with phase("Decomposed") as decomposing:
        with processes.raise_on_all_ranks():
            for target in logging.tqdm(own, desc="Decomposing", unit="layer"):
                found[target.name] = _decompose(metric, target, calibration, layout)
                trim_heap(target.module.weight.device)
        if not processes.is_single:
            for target in targets:
                parts = vars(found[target.name]) if target.name in found else None
                device = to_float64(target.module.weight[:0]).device
                found[target.name] = Decomposition(**processes.send(parts, owners[target.name], device))
        decomposing.add_detail(f"{len(targets)} layers")
    return {target.canonical_name: found[target.name] for target in targets}


def _decompose(metric: Metric, target: Target, calibration: Calibration | None, layout: str) -> Decomposition:
    weight = to_float64(target.module.weight)
    statistics = None if calibration is None else _to(_statistics(calibration, target), weight)
    if statistics is not None and target.module.bias is None:
        statistics = statistics.about_zero(weight)
    decomposition = metric.decompose(weight, statistics)
    # A layer stays dense from the break-even rank on, so that no further component is ever used.
    m, n = target.shape
    keep = max(1, int(break_even(m, n, layout)))
    dtype = torch.promote_types(target.module.weight.dtype, torch.float32)
    return decomposition.truncated(keep, dtype)


@dataclass
class Decompositions:
    """Everything from which structures are chosen and layers are made.

    Attributes:
        layers: Decompositions by canonical name, of single layers and of joint ones.
        mlps: By name of the site.
        mlp_losses: Their losses, by name of the site.
    """

    layers: dict[str, Decomposition] = field(default_factory=dict)
    mlps: dict[str, TwoSidedMlp] = field(default_factory=dict)
    mlp_losses: dict[str, list[WidthLosses]] = field(default_factory=dict)

    def update(self, other: Decompositions, device: str | None) -> None:
        """Add others, on another device if one is given."""
        self.layers |= {name: each if device is None else each.to(device) for name, each in other.layers.items()}
        self.mlps |= {name: each if device is None else each.to(device) for name, each in other.mlps.items()}
        self.mlp_losses |= other.mlp_losses

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiply losses by factors, given by the names of layers and sites."""
        for name, factor in factors.items():
            if name in self.layers:
                found = self.layers[name]
                self.layers[name] = dataclasses.replace(found, energies=found.energies * factor)
            else:
                self.mlp_losses[name] = [each.scaled(factor) for each in self.mlp_losses[name]]

    def losses(self, metric: Metric) -> dict[str, np.ndarray]:
        """Return the losses of layers, single and joint, in a unit in which they can be added up."""
        return {
            name: (decomposition.tails() if metric.common_unit else decomposition.losses()).cpu().numpy()
            for name, decomposition in self.layers.items()
        }


def decompose(
    metric: Metric,
    targets: Sequence[Target],
    sites: Sequence[Site],
    calibration: Calibration | None,
    budget: RankBudget,
    processes: Processes = SINGLE_PROCESS,
) -> Decompositions:
    """Decompose layers and sites.

    Args:
        metric: Measures the error of a layer.
        targets: The layers.
        sites: Those that are decided together.
        calibration: Statistics by module name; None for a metric that uses no data.
        budget: Knows the layout, and which widths of an MLP to consider.
        processes: The processes that share the work.

    Raises:
        ValueError: if the calibration lacks a layer or a statistic.
    """
    mlps = [site for site in sites if isinstance(site, Mlp)]
    inside = {layer.name for mlp in mlps for layer in mlp.layers}
    joints = [site.joint for site in sites if isinstance(site, SharedInput)]
    single = [target for target in targets if target.name not in inside]
    found = Decompositions(decompose_layers(metric, [*single, *joints], calibration, budget.layout, processes))
    if mlps:
        assert calibration is not None  # only a metric that uses data finds sites
        _decompose_mlps(mlps, calibration, budget, processes, found)
    return found


def _decompose_mlps(
    mlps: Sequence[Mlp], calibration: Calibration, budget: RankBudget, processes: Processes, found: Decompositions
) -> None:
    owners = processes.balance_tasks({mlp.name: float(mlp.num_units**3) for mlp in mlps})
    with phase("Chose hidden units") as choosing:
        made = {mlp.name: _two_sided(mlp, calibration) for mlp in mlps}
        with processes.raise_on_all_ranks():
            own = [mlp for mlp in mlps if owners[mlp.name] == processes.index]
            for mlp in logging.tqdm(own, desc="Choosing hidden units", unit="block"):
                made[mlp.name] = made[mlp.name].selected()
                found.mlp_losses[mlp.name] = made[mlp.name].losses(budget.widths(mlp.num_units))
        for mlp in mlps:
            owner = owners[mlp.name]
            found.mlp_losses[mlp.name] = processes.broadcast(found.mlp_losses.get(mlp.name, []), owner)
            if not processes.is_single:
                selection = vars(made[mlp.name].selection) if owner == processes.index else None
                device = made[mlp.name].second_weight.device
                chosen = UnitSelection(**processes.send(selection, owner, device))
                made[mlp.name] = dataclasses.replace(made[mlp.name], selection=chosen)
        found.mlps.update(made)
        choosing.add_detail(f"{len(mlps)} blocks")


def _two_sided(mlp: Mlp, calibration: Calibration) -> TwoSidedMlp:
    weights, statistics = [], []
    for target in (mlp.first, mlp.second):
        weight = to_float64(target.module.weight)
        each = _to(_statistics(calibration, target), weight)
        weights.append(weight)
        statistics.append(each.about_zero(weight) if target.module.bias is None else each)
    return TwoSidedMlp.of((weights[0], weights[1]), (statistics[0], statistics[1]), KfacMetric().damping)


def factorize_layers(
    model: nn.Module,
    targets: Sequence[Target],
    sites: Sequence[Site],
    found: Decompositions,
    choices: Mapping[str, LayerChoice],
    calibration: Calibration | None,
    layout: str = "factors",
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, FactoredLayer]:
    """Replace the layers of `model` by what has been chosen for them; return the rank map.

    Several processes share the work, and all end up with the same layers.

    Args:
        model: Changed in place; `targets` may belong to it or to the model that it is a copy of.
        targets: The layers.
        sites: Those that were decided together.
        found: Used decompositions are removed, so that memory does not grow.
        choices: By canonical name.
        calibration: Statistics by module name, to correct biases; None leaves biases unchanged.
        layout: How factors are stored; see `FactoredLayer`.
        processes: The processes that share the work.
    """
    makers = {place.target.name: place for place in places_of(targets, sites, choices)}
    factory = LayerFactory(found, calibration, layout)
    in_order = [place.target for place in makers.values()]
    for name, layer in make_layers(
        in_order, lambda target: factory.make(makers[target.name]), processes, "Factorizing"
    ):
        insert_layer(model, makers[name].target, layer, makers[name].chunks)
    return rank_map_of(model, targets)


@dataclass(frozen=True)
class ChosenLayer:
    """A layer, or a joint one, that is to be replaced; `mlp` is the one that it belongs to."""

    target: Target
    choice: LayerChoice
    mlp: Mlp | None = None

    @property
    def chunks(self) -> int:
        """Number of stacked parts of its outputs that lose the same units."""
        return 1 if self.mlp is None else self.mlp.chunks_of(self.target)


def places_of(
    targets: Sequence[Target], sites: Sequence[Site], choices: Mapping[str, LayerChoice]
) -> list[ChosenLayer]:
    """Return the layers to make for what has been chosen, by canonical name, for all targets."""
    return [*_site_places(sites, choices), *_single_places(targets, sites, choices)]


def _site_places(sites: Sequence[Site], choices: Mapping[str, LayerChoice]) -> Iterator[ChosenLayer]:
    for site in sites:
        choice = choices[site.layers[0].canonical_name]
        if isinstance(site, Mlp):
            for target, its in ((site.first, choice), (site.second, choices[site.second.canonical_name])):
                if not its.is_dense:
                    yield ChosenLayer(target, its, site)
        elif choice.shared:
            yield ChosenLayer(site.joint, choice)


def _single_places(
    targets: Sequence[Target], sites: Sequence[Site], choices: Mapping[str, LayerChoice]
) -> Iterator[ChosenLayer]:
    in_mlps = {layer.name for site in sites if isinstance(site, Mlp) for layer in site.layers}
    for target in targets:
        choice = choices[target.canonical_name]
        if target.name not in in_mlps and not choice.shared and not choice.is_dense:
            yield ChosenLayer(target, choice)


@dataclass(frozen=True)
class LayerFactory:
    """Makes layers from decompositions, which are removed when they have been used unless `keep` is set."""

    found: Decompositions
    calibration: Calibration | None
    layout: str
    keep: bool = False

    def make(self, place: ChosenLayer) -> nn.Module:
        """Return the layer that has been chosen."""
        if place.mlp is not None:
            return self._part_of_mlp(place, place.mlp)
        assert place.choice.rank is not None  # dense layers are left out
        name = place.target.canonical_name
        found = self.found.layers[name] if self.keep else self.found.layers.pop(name)
        A, B = found.factors(place.choice.rank)
        return factored_linear(place.target.module, A, B, self.layout, self._mean(place.target))

    def _part_of_mlp(self, place: ChosenLayer, mlp: Mlp) -> nn.Module:
        # After several passes the statistics are on the host.
        device = to_float64(place.target.module.weight[:0]).device
        decomposed, rank = self.found.mlps[mlp.name].to(device), place.choice.rank
        units = decomposed.units(place.choice.width or mlp.num_units)
        mean = self._mean(place.target)
        if place.target is mlp.first:
            rows = rows_of_units(units, mlp.first.module.out_features, mlp.num_units)
            narrow = selected_rows(mlp.first.module, rows)
            decomposition = None if rank is None else decomposed.first_decomposition(units)
        else:
            weight, dense = decomposed.narrowed_second(units), mlp.second.module
            bias = dense.bias
            if bias is not None and mean is not None:
                removed = to_float64(dense.weight) @ mean.to(weight) - weight @ mean.to(weight)[units]
                bias = to_float64(bias) + removed
            narrow = linear_like(dense, weight, bias)
            mean = None if mean is None else mean.to(weight)[units]
            decomposition = None if rank is None else decomposed.second_decomposition(units)
        if rank is None or decomposition is None:
            return narrow
        A, B = decomposition.factors(rank)
        return factored_linear(narrow, A, B, self.layout, mean)

    def _mean(self, target: Target) -> torch.Tensor | None:
        if self.calibration is None:
            return None
        return _statistics(self.calibration, target).require(Statistic.INPUT_MEAN)


def _statistics(calibration: Calibration, target: Target) -> LayerStatistics:
    if target.name not in calibration.layers:
        raise ValueError(
            f"The calibration holds no statistics of layer {target.name!r}; calibrate with the same target_modules and "
            "exclude_modules."
        )
    statistics = calibration.layers[target.name]
    for statistic in Statistic:
        tensor = getattr(statistics, statistic.value)
        # The number of tokens per image is not known here.
        if tensor is not None and tensor.shape != (shape := statistic.shape(*target.shape, *tensor.shape[:1])):
            raise ValueError(
                f"The calibration's {statistic.value} of layer {target.name!r} has the shape {list(tensor.shape)}; "
                f"{list(shape)} is needed. The file is damaged or belongs to another model; calibrate again."
            )
    return statistics


def priced_sites(sites: Sequence[Site], calibration: Calibration) -> list[Site]:
    """Return the sites for which there are statistics, as there may not be in files of earlier versions."""
    found = [site for site in sites if _is_priced(site, calibration)]
    if len(found) < len(sites):
        logger.warning(
            f"The statistics do not say how {len(sites) - len(found)} of {len(sites)} groups of layers (such as query, key "
            "and value) would fare with shared factors or fewer units. Each of their layers is factored by itself; "
            "calibrate again for more accuracy."
        )
    return found


def _is_priced(site: Site, calibration: Calibration) -> bool:
    if isinstance(site, SharedInput):
        return site.joint.name in calibration.layers or _larger_joint(calibration, site.joint) is not None
    known = [calibration.layers.get(target.name) for target in (site.first, site.second)]
    return all(
        each is not None and each.gradient_moment is not None and each.input_covariance is not None for each in known
    )


def with_joints(calibration: Calibration, sites: Sequence[Site]) -> Calibration:
    """Return statistics that name the joint layers of all sites, also those with fewer members than were calibrated."""
    joints = [site.joint for site in sites if isinstance(site, SharedInput)]
    missing = [joint for joint in joints if joint.name not in calibration.layers and _larger_joint(calibration, joint)]
    found = {joint.name: _of_larger_joint(calibration, joint) for joint in missing}
    return dataclasses.replace(calibration, layers={**calibration.layers, **found}) if found else calibration


def _larger_joint(calibration: Calibration, target: Target) -> tuple[str, list[str]] | None:
    """Return the name of a joint layer in the statistics with all members of another one, and those of its parts."""
    wanted = [member.name for member in target.members]
    parent = wanted[0].rpartition(".")[0]
    for name, statistics in calibration.layers.items():
        parts = [f"{parent}.{part}" for part in name.rpartition(".")[2].split("+")]
        is_joint = len(parts) > 1 and name.startswith(f"{parent}.") and statistics.gradient_moment is not None
        if is_joint and set(wanted) <= set(parts):
            return name, parts
    return None


def _of_larger_joint(calibration: Calibration, target: Target) -> LayerStatistics:
    """Return the statistics of a joint layer from those of one that has more members."""
    found = _larger_joint(calibration, target)
    assert found is not None  # sites without statistics are left out
    name, parts = found
    statistics = calibration.layers[name]
    moment = statistics.require(Statistic.GRADIENT_MOMENT)
    sizes = [len(calibration.layers[part].require(Statistic.GRADIENT_MOMENT)) for part in parts]
    rows = torch.arange(sum(sizes)).split(sizes)
    chosen = torch.cat([rows[parts.index(member.name)] for member in target.members]).to(moment.device)
    return dataclasses.replace(statistics, gradient_moment=moment[chosen][:, chosen])


def _to(statistics: LayerStatistics, tensor: torch.Tensor) -> LayerStatistics:
    moved = {
        statistic.value: value.to(tensor.device)
        for statistic in Statistic
        if (value := getattr(statistics, statistic.value)) is not None
    }
    return dataclasses.replace(statistics, **moved)


def decompose_by_groups(
    metric: Metric,
    groups: Sequence[Sequence[Target]],
    sites: Sequence[Site],
    budget: RankBudget,
    task: CalibrationTask,
    to_compensate: bool,
) -> tuple[Decompositions, Calibration, float]:
    """Calibrate and decompose group by group, so that only the statistics of one group are held at a time.

    Every group takes one pass over the images. With several groups, results are kept on the host.

    Args:
        metric: Measures the error of a layer.
        groups: The layers.
        sites: Those that are decided together; all layers of a site belong to the same group.
        budget: As for `decompose`.
        task: Collects the statistics.
        to_compensate: Whether to keep what compensation needs of the statistics; means are always kept.

    Returns:
        The decompositions, the statistics that later steps need, and the seconds spent decomposing.

    Raises:
        ValueError: as `CalibrationTask.collect_once` and `decompose`.
    """
    decompositions = Decompositions()
    parts: list[Calibration] = []
    seconds = 0.0
    device = None if len(groups) == 1 else "cpu"
    for group in groups:
        names = {target.name for target in group}
        inside = [site for site in sites if names.issuperset(layer.name for layer in site.layers)]
        part = task.collect_once(group)
        start = time.perf_counter()
        found = decompose(metric, group, inside, part, budget, task.processes)
        seconds += time.perf_counter() - start
        decompositions.update(found, device)
        kept = COMPENSATION_STATISTICS if to_compensate else frozenset()
        layers = {name: statistics.only(kept, device) for name, statistics in part.layers.items()}
        parts.append(dataclasses.replace(part, layers=layers))
        # Free their memory before the next pass.
        del part, found, layers
    together = dataclasses.replace(
        parts[0],
        layers={name: statistics for part in parts for name, statistics in part.layers.items()},
        seconds=sum(part.seconds for part in parts),
    )
    return decompositions, together, seconds
