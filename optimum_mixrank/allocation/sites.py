"""Layers whose structures are decided together: those that share an input, and the two layers of an MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..decomposition.mlp import WidthLosses
from .choice import LayerChoice
from .combining import combine, efficient
from .problem import LayerProfile


SiteOption = tuple[LayerChoice, ...]
"""One choice for each layer of a site."""


@dataclass(frozen=True, eq=False)
class SiteProfile:
    """What an allocator knows about a site; it takes the place of a `LayerProfile`.

    Attributes:
        name: Name of the site.
        layers: Names of its layers.
        options: All choices worth considering, by ascending cost and descending loss.
        option_costs: Their costs, int64.
        option_losses: Their losses, float64.
        dense_cost: Cost of the dense layers.
    """

    name: str
    layers: tuple[str, ...]
    options: tuple[SiteOption, ...]
    option_costs: np.ndarray
    option_losses: np.ndarray
    dense_cost: int

    def cost(self, option: SiteOption) -> int:
        """Return the cost of an option."""
        return int(self.option_costs[self.options.index(option)])

    def loss(self, option: SiteOption) -> float:
        """Return the loss of an option."""
        return sum(choice.loss for choice in option)


class _Candidate(NamedTuple):
    cost: int
    loss: float
    option: SiteOption


NewProfile = Callable[[str, int, int, "np.ndarray | None"], LayerProfile]
"""Makes the profile of one layer from its name, `out_features`, `in_features` and losses."""


def shared_input_profile(
    name: str, members: Sequence[LayerProfile], joint: LayerProfile, shares: Sequence[float]
) -> SiteProfile:
    """Return the profile of layers that see the same input: factored each by itself, or with one first factor for all.

    Args:
        name: Name of the site.
        members: The layers.
        joint: All of them as one layer.
        shares: Share of each layer in the loss of the joint one, adding up to 1.
    """
    candidates = list(_separately(members))
    for rank in joint.candidate_ranks:
        loss = joint.loss(rank)
        option = tuple(LayerChoice(rank, shared=True, loss=loss * share) for share in shares)
        candidates.append(_Candidate(joint.cost(rank), loss, option))
    return _profile(name, [each.name for each in members], candidates, sum(each.dense_cost for each in members))


def mlp_profile(
    name: str,
    layers: tuple[Sequence[str], str],
    shapes: tuple[tuple[int, int], tuple[int, int]],
    losses: Sequence[WidthLosses],
    new_profiles: tuple[NewProfile, NewProfile],
) -> SiteProfile:
    """Return the profile of an MLP: at each width, each of its two layers is factored or dense.

    Args:
        name: Name of the site.
        layers: Names of the first layer, or of the gate and the value that are one layer together, and of the second.
        shapes: Shapes of the first and of the second layer at full width.
        losses: Losses by width.
        new_profiles: Make the profiles of the first and of the second layer.
    """
    (rows, n), (m, units) = shapes
    first_names, second_name = layers
    new_first, new_second = new_profiles
    candidates: list[_Candidate] = []
    for each in losses:
        width = each.width if each.width < units else None
        pair = [
            new_first(f"{name}, first", rows // units * each.width, n, each.first.numpy()),
            new_second(f"{name}, second", m, each.width, each.second.numpy()),
        ]
        for found in _separately(pair):
            first, second = found.option
            shared = len(first_names) > 1 and first.rank is not None
            parts = [LayerChoice(first.rank, shared, width, first.loss / len(first_names))] * len(first_names)
            last = LayerChoice(second.rank, False, width, second.loss + each.width_loss)
            candidates.append(_Candidate(found.cost, found.loss + each.width_loss, (*parts, last)))
    dense = new_first(name, rows, n, None).dense_cost + new_second(name, m, units, None).dense_cost
    return _profile(name, [*first_names, second_name], candidates, dense)


def _separately(members: Sequence[LayerProfile]) -> Iterator[_Candidate]:
    for indices in combine([(each.option_costs, each.option_losses) for each in members]):
        chosen = list(zip(members, indices, strict=True))
        option = tuple(
            LayerChoice(each.options[index], loss=float(each.option_losses[index])) for each, index in chosen
        )
        cost = sum(int(each.option_costs[index]) for each, index in chosen)
        yield _Candidate(cost, sum(choice.loss for choice in option), option)


def _profile(name: str, layers: Sequence[str], candidates: Sequence[_Candidate], dense_cost: int) -> SiteProfile:
    costs = np.array([each.cost for each in candidates], dtype=np.int64)
    losses = np.array([each.loss for each in candidates], dtype=np.float64)
    kept = efficient(costs, losses)
    options = tuple(candidates[index].option for index in kept)
    return SiteProfile(name, tuple(layers), options, costs[kept], losses[kept], dense_cost)
