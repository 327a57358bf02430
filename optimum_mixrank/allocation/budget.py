"""From the shapes of layers and the constraints of a configuration to ranks; no tensor or model is needed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ..checkpoint.rank_map import break_even, stored_values
from ..decomposition.mlp import WidthLosses
from ..runtime.logging import get_logger
from . import ALLOCATORS, AllocationProblem, BudgetError, LayerProfile
from .choice import Allocation, LayerChoice
from .costs import PARAMETERS, Costs, MeasuredTime
from .probes import Probe, probe_of
from .sites import NewProfile, SiteProfile, mlp_profile, shared_input_profile
from .specs import LayerSpec, MlpSpec, ModelSize, SharedInputSpec, SiteSpec


logger = get_logger(__name__)

NUM_WIDTHS = 24
"""Number of widths of an MLP among which to choose; ranks bridge the steps between them."""

_TOLERANCE = 1e-6
"""In stored values or ranks, so that floating-point rounding does not miss a ratio like 0.6 of a round number."""


NO_MLPS: Mapping[str, Sequence[WidthLosses]] = MappingProxyType({})


@dataclass(frozen=True)
class RankBudget:
    """The budget for the targeted layers, and the constraints on their ranks.

    Args:
        layers: The targeted layers.
        model_cost: Parameters, multiply-adds per image or time per batch of the whole model.
        compression_ratio: Fraction to remove, in (0, 1).
        compression_scope: `"model"` or `"targets"`, of which the fraction is removed.
        rank_multiple: Ranks are multiples of it.
        min_rank: Smallest rank.
        min_rank_ratio: Smallest share of the break-even rank, at which factors cost as much as the dense layer.
        layout: How factors are stored; see `FactoredLayer`.
        max_rank_ratio: Largest share of the break-even rank of a factored layer; staying dense remains possible.
        costs: Prices layers.
        factored: Whether single layers may be factored; if not, they stay dense unless they are part of a site.
        sites: Layers whose structures are decided together; a layer is in one of them at most.
        size: Parameters that the whole model may have, exactly; the ratio then says about the same.

    Raises:
        ValueError: if the rank or ratio that the user asked for does not fit a layer.
    """

    layers: Sequence[LayerSpec]
    model_cost: int
    compression_ratio: float
    compression_scope: str = "model"
    rank_multiple: int = 1
    min_rank: int = 1
    min_rank_ratio: float = 0.1
    layout: str = "factors"
    max_rank_ratio: float | None = None
    costs: Costs = PARAMETERS
    factored: bool = True
    sites: Sequence[SiteSpec] = ()
    size: ModelSize | None = None

    def __post_init__(self) -> None:
        for layer in self.layers:
            limit = min(layer.out_features, layer.in_features)
            if layer.rank is not None and layer.rank > limit:
                raise ValueError(
                    f"rank_pattern gives rank {layer.rank} to layer {layer.name!r} of shape [{layer.out_features}, "
                    f"{layer.in_features}], whose largest rank is {limit}. Choose {limit} or less."
                )
            if layer.rank is not None and layer.ratio is not None:
                raise ValueError(
                    f"Both rank_pattern and ratio_pattern match layer {layer.name!r}. Narrow one of the two."
                )

    @property
    def budget(self) -> int:
        """Cost that all targeted layers together may have."""
        if self.size is not None:
            return self.size.parameters - (self.model_cost - self._targeted)
        return math.floor(self._targeted - self.compression_ratio * self._base + _TOLERANCE)

    @property
    def is_reachable(self) -> bool:
        """Whether any ranks meet the budget."""
        problem = self.problem({})
        return problem.min_cost <= problem.budget

    def check(self) -> None:
        """Check that some ranks meet the budget, and warn about ranks that would save nothing.

        Raises:
            ValueError: if none do; the message says which ratio can be reached. Also if nothing is to be removed.
        """
        if not self.is_reachable:
            raise ValueError(self._unreachable())
        profiles = [each for each in self.problem({}).layers if isinstance(each, LayerProfile)]
        if self.budget >= self._targeted and not any(each.fixed_rank and each.candidate_ranks for each in profiles):
            raise ValueError(
                f"compression_ratio={self.compression_ratio} of {self._base:,} {self.costs.unit} is less than one, so that "
                "every layer would stay dense; raise the ratio."
            )
        for layer in self._free:
            profile = self._profile(layer, None)
            if layer.rank is not None and not profile.candidate_ranks:
                takes, what = ("no less time", "time") if self.counts_time else ("no fewer parameters", "parameters")
                logger.warning(
                    f"rank_pattern gives rank {layer.rank} to layer {layer.name!r}, which takes {takes} than "
                    f"the dense layer: it stays dense. Ranks up to {profile.break_even} save {what}."
                )

    def allocate(
        self,
        losses: Mapping[str, np.ndarray],
        allocation: str,
        mlp_losses: Mapping[str, Sequence[WidthLosses]] = NO_MLPS,
    ) -> Allocation:
        """Decide the structure of every layer.

        Args:
            losses: Of each layer at rank 0, …, min(m, n), `[min(m, n) + 1]`, by canonical name; of layers that share an
                input also together as one layer, by the name of the site. The layers of an MLP need none.
            allocation: Name of the allocator.
            mlp_losses: Of each MLP at several widths, by the name of the site.

        Raises:
            ValueError: if the budget cannot be met.
        """
        return self.solve(self.problem(losses, mlp_losses), allocation)

    def solve(self, problem: AllocationProblem, allocation: str) -> Allocation:
        """Decide the structure of every layer, given what `problem` returns; see `allocate`."""
        try:
            options = ALLOCATORS.create(allocation).allocate(problem)
        except BudgetError as error:
            raise ValueError(self._unreachable()) from error
        choices: dict[str, LayerChoice] = {}
        for profile in problem.layers:
            option = options[profile.name]
            if isinstance(profile, SiteProfile):
                choices.update(zip(profile.layers, option, strict=True))
            else:
                choices[profile.name] = LayerChoice(option, loss=profile.loss(option))
        cost = problem.total_cost(options) + self.budget - problem.budget
        return Allocation(
            {layer.name: choices.get(layer.name, LayerChoice()) for layer in self.layers},
            cost,
            problem.total_loss(options),
        )

    def probes(
        self, losses: Mapping[str, np.ndarray], mlp_losses: Mapping[str, Sequence[WidthLosses]] = NO_MLPS
    ) -> list[Probe]:
        """Return a structure to measure for each curve of losses: one that keeps about the share of the budget.

        Curves are those of single layers, of layers that share an input as one, and of MLPs; the other arguments are those
        of `allocate`. Curves without any structure that saves anything are left out.
        """
        share = max(self.budget, 0) / self._targeted
        specs = {layer.name: layer for layer in self._free}
        found: list[Probe] = []
        for site in self.sites:
            members = [specs[name] for name in site.members]
            if isinstance(site, MlpSpec):
                found += probe_of(self._mlp(site, members, mlp_losses), share)
                for name in site.members:
                    del specs[name]
            else:
                found += probe_of(self._joint(site, members, losses), share, site.members)
        for layer in specs.values():
            found += probe_of(self._profile(layer, losses.get(layer.name)), share)
        return found

    def kept(self, allocation: Allocation) -> float:
        """Return the share of the targeted layers' cost that an allocation keeps."""
        return allocation.cost / self._targeted

    def kept_of_model(self, allocation: Allocation) -> float:
        """Return the share of the whole model's cost that an allocation keeps."""
        return 1 - (self._targeted - allocation.cost) / self.model_cost

    def num_values(self, choices: Mapping[str, LayerChoice]) -> int:
        """Return how many values the weights of all targeted layers keep."""
        layers = {layer.name: layer for layer in self.layers}
        total = 0
        for site in self.sites:
            choice = choices[site.members[0]]
            if not (isinstance(site, MlpSpec) or choice.shared):
                continue
            specs = [layers.pop(name) for name in site.members]
            if isinstance(site, MlpSpec):
                total += self._values_of_mlp(specs, [choices[each.name] for each in specs])
            else:
                total += self._values(sum(each.out_features for each in specs), specs[0].in_features, choice.rank)
        return total + sum(self._values(s.out_features, s.in_features, choices[s.name].rank) for s in layers.values())

    def _values_of_mlp(self, specs: Sequence[LayerSpec], choices: Sequence[LayerChoice]) -> int:
        *first, second = specs
        rows, width = sum(each.out_features for each in first), choices[-1].width or second.in_features
        return self._values(rows * width // second.in_features, first[0].in_features, choices[0].rank) + self._values(
            second.out_features, width, choices[-1].rank
        )

    def _values(self, out_features: int, in_features: int, rank: int | None) -> int:
        if rank is None:
            return out_features * in_features
        return stored_values(out_features, in_features, rank, self.layout)

    @property
    def _targeted(self) -> int:
        return sum(self.costs.dense_cost(layer) for layer in self.layers)

    @property
    def _base(self) -> int:
        return self.model_cost if self.compression_scope == "model" else self._targeted

    @property
    def _free(self) -> list[LayerSpec]:
        # A ratio of 0 leaves a layer dense: there is nothing to decide.
        return [layer for layer in self.layers if layer.ratio != 0]

    def problem(
        self, losses: Mapping[str, np.ndarray], mlp_losses: Mapping[str, Sequence[WidthLosses]] = NO_MLPS
    ) -> AllocationProblem:
        """Return all options of layers and sites, and what may be spent on them; see `allocate` for the arguments."""
        by_name = {layer.name: layer for layer in self._free}
        profiles: list[LayerProfile | SiteProfile] = []
        for site in self.sites:
            members = [by_name.pop(name) for name in site.members]
            if isinstance(site, MlpSpec):
                profiles.append(self._mlp(site, members, mlp_losses))
            else:
                profiles.append(self._shared_input(site, members, losses))
        profiles += [self._profile(layer, losses.get(layer.name)) for layer in by_name.values()]
        return AllocationProblem(tuple(profiles), self.free_budget)

    @property
    def free_budget(self) -> int:
        """Cost that the layers may have that the user has not left dense."""
        return self.budget - sum(self.costs.dense_cost(layer) for layer in self.layers if layer.ratio == 0)

    def _shared_input(
        self, site: SharedInputSpec, members: Sequence[LayerSpec], losses: Mapping[str, np.ndarray]
    ) -> SiteProfile:
        joint = self._joint(site, members, losses)
        return shared_input_profile(
            site.name,
            [self._profile(each, losses.get(each.name)) for each in members],
            joint,
            [each.out_features / joint.out_features for each in members],
        )

    def _joint(
        self, site: SharedInputSpec, members: Sequence[LayerSpec], losses: Mapping[str, np.ndarray]
    ) -> LayerProfile:
        rows = sum(each.out_features for each in members)
        spec = replace(members[0], name=site.name, out_features=rows, members=len(members))
        return replace(self._profile(spec, losses.get(site.name)), factored=True)

    def _mlp(
        self, site: MlpSpec, members: Sequence[LayerSpec], mlp_losses: Mapping[str, Sequence[WidthLosses]]
    ) -> SiteProfile:
        *first, second = members
        rows = sum(each.out_features for each in first)
        joint = replace(first[0], out_features=rows, members=len(first), side="out", full_size=rows)
        makers = self._maker(joint), self._maker(replace(second, side="in", full_size=second.in_features))
        shapes = (rows, first[0].in_features), (second.out_features, second.in_features)
        found = mlp_losses.get(site.name) or self._without_losses(*shapes)
        return mlp_profile(site.name, (site.first, site.second), shapes, found, makers)

    def _maker(self, layer: LayerSpec) -> NewProfile:
        """Return the function that makes the profile of a layer with another name and with fewer hidden units."""

        def new_profile(name: str, out_features: int, in_features: int, tails: np.ndarray | None) -> LayerProfile:
            narrow = replace(layer, name=name, out_features=out_features, in_features=in_features)
            return self._profile(narrow, tails)

        return new_profile

    def _without_losses(self, first: tuple[int, int], second: tuple[int, int]) -> list[WidthLosses]:
        """Return the smallest and the largest width of an MLP, before any data is seen."""
        (rows, n), (m, units) = first, second
        return [
            WidthLosses.zero(width, (rows // units * width, n), (m, width))
            for width in sorted({self.smallest_width(units), units})
        ]

    def smallest_width(self, units: int) -> int:
        """Return the fewest hidden units that an MLP may keep: the share of them that ranks must keep of break-even."""
        lowest = max(self.min_rank, math.ceil(self.min_rank_ratio * units - _TOLERANCE), 1)
        return min(units, -(-lowest // self.rank_multiple) * self.rank_multiple)

    def widths(self, units: int) -> list[int]:
        """Return the widths to consider for an MLP with this many hidden units, ascending, the full width last."""
        step = -(-units // NUM_WIDTHS)
        step = -(-step // self.rank_multiple) * self.rank_multiple
        steps = range(step, units, step)
        lowest = self.smallest_width(units)
        return sorted({lowest, units, *(width for width in steps if width > lowest)})

    def _profile(self, layer: LayerSpec, losses: np.ndarray | None) -> LayerProfile:
        m, n = layer.out_features, layer.in_features
        fixed = layer.rank
        if layer.ratio is not None:
            share = (1 - layer.ratio) * m * n + _TOLERANCE
            multiples = range(0, min(m, n) + 1, self.rank_multiple)
            fixed = multiples[bisect_right(multiples, share, key=lambda r: stored_values(m, n, r, self.layout)) - 1]
            if fixed < 1:
                raise ValueError(
                    f"ratio_pattern removes {layer.ratio:.2%} of layer {layer.name!r}, which leaves no rank of "
                    f"{self.rank_multiple}. Remove less, or exclude the layer."
                )
        full = break_even(m, n, self.layout)
        lowest = max(self.min_rank, math.ceil(self.min_rank_ratio * full - _TOLERANCE), 1)
        lowest = -(-lowest // self.rank_multiple) * self.rank_multiple
        highest = None
        if self.max_rank_ratio is not None:
            # A ceiling below the floor would leave no rank: then the floor is the only one.
            highest = max(math.floor(self.max_rank_ratio * full + _TOLERANCE), lowest)
        return self.costs.profile(
            layer,
            losses=np.zeros(min(m, n) + 1) if losses is None else losses,
            layout=self.layout,
            min_rank=lowest,
            max_rank=highest,
            rank_multiple=self.rank_multiple,
            fixed_rank=fixed,
            factored=self.factored or fixed is not None,
        )

    def _unreachable(self) -> str:
        problem, targeted = self.problem({}), self._targeted
        # The two budgets differ by the cost of the layers that stay dense.
        minimum = problem.min_cost + self.budget - problem.budget
        largest = max(targeted - minimum, 0) * 1000 // self._base / 1000
        if self.size is not None:
            return self._too_small(minimum)
        if self.counts_time and self.compression_scope == "model":
            return self._too_fast(largest, minimum)
        reachable = (
            f"The largest ratio that can be reached is {largest}; lower the ratio or these floors, or "
            f"{self._more_to_choose_from}."
            if largest > 0
            else f"No layer can shrink at all; lower these floors, change the patterns, or {self._more_to_choose_from}."
        )
        return (
            f"compression_ratio={self.compression_ratio} (of the {self.compression_scope}) cannot be reached: the "
            f"targeted layers hold {targeted:,} of the model's {self.model_cost:,} {self.costs.unit} and keep at least "
            f"{minimum:,} under min_rank={self.min_rank}, min_rank_ratio={self.min_rank_ratio}, "
            f"rank_multiple={self.rank_multiple} and the patterns. {reachable}"
        )

    def _too_small(self, minimum: int) -> str:
        """Return the message for a size below what can be reached; `minimum` is the least that targeted layers keep."""
        rest = self.model_cost - self._targeted
        return (
            f"{self.size} cannot be reached: the targeted layers hold {self._targeted:,} of the model's "
            f"{self.model_cost:,} {self.costs.unit} and keep at least {minimum:,} under min_rank={self.min_rank}, "
            f"min_rank_ratio={self.min_rank_ratio}, rank_multiple={self.rank_multiple} and the patterns; everything else "
            f"has {rest:,}. The smallest size that can be reached is target_parameters={rest + minimum}; give that or "
            f"more, lower these floors, or {self._more_to_choose_from}."
        )

    def _too_fast(self, largest: float, minimum: int) -> str:
        """Return the message for a latency below what can be reached; `largest` is the largest ratio that can be."""
        rest = (self.model_cost - self._targeted) / self.model_cost
        smallest = round(1 - largest, 3)
        reachable = (
            f"The smallest target_latency that can be reached is {smallest}; raise it, lower these floors, or "
            f"{self._more_to_choose_from}."
            if largest > 0
            else "No layer can get faster at all; lower these floors, change the patterns, or measure the table again."
        )
        return (
            f"target_latency={round(1 - self.compression_ratio, 6)} cannot be reached: by the table of latencies, the "
            f"targeted layers take at least {minimum / self.model_cost:.3f} of the dense model's time under "
            f"min_rank={self.min_rank}, min_rank_ratio={self.min_rank_ratio}, rank_multiple={self.rank_multiple} and the "
            f"patterns, and everything else takes {rest:.3f}. {reachable}"
        )

    @property
    def _more_to_choose_from(self) -> str:
        """What else lets the layers become smaller."""
        return "target more layers" if self.factored else "add 'rank' to structures"

    @property
    def counts_time(self) -> bool:
        """Whether costs are measured times."""
        return isinstance(self.costs, MeasuredTime)
