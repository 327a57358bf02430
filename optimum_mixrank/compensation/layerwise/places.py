"""What is solved as one layer: a single one, several that share a first factor, or a part of an MLP with fewer units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, cat

from ...calibration.moments import PairAccumulator
from ...calibration.sites import Mlp, SharedInput
from ...checkpoint.names import Target
from ...checkpoint.narrowing import selected_columns, selected_rows
from ...decomposition import LayerStatistics
from ...decomposition.mlp import rows_of_units
from ..compensator import CompensationTask


@dataclass(frozen=True, eq=False)
class Place:
    """A layer of the compressed model that is computed anew.

    Attributes:
        target: The original layer, or a joint one; of an MLP that loses units, only the rows or columns that stay, once
            these are known.
        rank: Its rank; None for a dense layer.
        layout: How its factors are stored.
        statistics: Calibration statistics of the original layer, if there are any.
        mlp: The MLP that it belongs to, if that loses units.
        width: How many units that keeps.
    """

    target: Target
    rank: int | None
    layout: str
    statistics: LayerStatistics | None = None
    mlp: Mlp | None = None
    width: int = 0

    @property
    def layers(self) -> tuple[Target, ...]:
        """The layers of the model that it stands for."""
        return self.target.layers

    @property
    def original(self) -> Target:
        """The original layer, or joint one, at full width."""
        if self.mlp is None:
            return self.target
        return self.mlp.first if self.is_first else self.mlp.second

    @property
    def chunks(self) -> int:
        """Number of stacked parts of its outputs that lose the same units."""
        return 1 if self.mlp is None else self.mlp.chunks_of(self.target)

    @property
    def is_first(self) -> bool:
        """Whether it is the first layer of an MLP that loses units."""
        return self.mlp is not None and self.target.name == self.mlp.first.name

    def with_units(self, units: Tensor) -> Place:
        """Return the place with those parts of an MLP's layer that belong to some of its units."""
        if self.mlp is None:
            return self
        if not self.is_first:
            return replace(self, target=replace(self.target, module=selected_columns(self.target.module, units)))
        rows = rows_of_units(units, self.target.module.out_features, self.mlp.num_units)
        statistics = self.statistics
        if statistics is not None and statistics.gradient_moment is not None:
            chosen = rows.to(statistics.gradient_moment.device)
            moment = statistics.gradient_moment[chosen][:, chosen]
            statistics = replace(statistics, gradient_moment=moment)
        return replace(
            self, target=replace(self.target, module=selected_rows(self.target.module, rows)), statistics=statistics
        )


def find_places(task: CompensationTask) -> list[Place]:
    """Return the places of a task."""
    joints = {site.layers: site.joint for site in task.sites if isinstance(site, SharedInput)}
    joints.update({site.first.members: site.first for site in task.sites if isinstance(site, Mlp)})
    narrowed = {
        layer.name: (site, task.choices[layer.canonical_name].width)
        for site in task.sites
        if isinstance(site, Mlp)
        for layer in site.layers
    }
    places: dict[str, Place] = {}
    for target in task.factored:
        entry = task.rank_map[target.canonical_name]
        mlp, width = narrowed.get(target.name, (None, None))
        joint = next((each for layers, each in joints.items() if target in layers), target)
        # The layers of a joint one share their first factor, or are those of a gate and a value that lose the same units.
        whole = joint if entry.members is not None or width is not None else target
        places.setdefault(
            whole.name,
            Place(
                whole,
                entry.rank,
                entry.layout,
                task.statistics.get(whole.name),
                *((mlp, width) if mlp is not None and width is not None else ()),
            ),
        )
    return list(places.values())


@dataclass(frozen=True)
class LayerMoments:
    """Means and covariances of the inputs and targets of a layer, or second moments for one without bias, in float64.

    Attributes:
        inputs: Covariance of the inputs, `[n, n]`.
        targets: Covariance of targets and inputs, `[m, n]`.
        input_mean: Mean of the inputs, `[n]`.
        target_mean: Mean of the targets, `[m]`.
        target_power: Variances of the targets, or their mean squares, `[m]`.
    """

    inputs: Tensor
    targets: Tensor
    input_mean: Tensor
    target_mean: Tensor
    target_power: Tensor

    @classmethod
    def of(cls, pairs: Sequence[PairAccumulator], centred: bool, like: Tensor) -> LayerMoments:
        """Take the moments of layers with the same inputs as those of one layer, on the device of a tensor."""
        found = [pair.moments(centred) for pair in pairs]
        means = [pair.means() for pair in pairs]
        return cls(
            found[0][0].to(like),
            cat([targets for _, targets in found]).to(like),
            means[0][0].to(like),
            cat([mean for _, mean in means]).to(like),
            cat([pair.target_powers(centred) for pair in pairs]).to(like),
        )

    def of_rows(self, rows: Tensor) -> LayerMoments:
        """Return the moments with some of the targets."""
        return replace(
            self,
            targets=self.targets[rows],
            target_mean=self.target_mean[rows],
            target_power=self.target_power[rows],
        )
