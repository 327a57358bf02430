"""A size of the whole model in place of a ratio: what it means for a given model, and how it is met."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..allocation.budget import RankBudget
from ..allocation.choice import Allocation
from ..allocation.problem import AllocationProblem
from ..allocation.specs import ModelSize
from ..calibration.sites import Site, removed_biases
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.files import count_parameters
from ..checkpoint.size import parameters_like


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIES = 6
"""How often an allocation is made again with what its removed biases leave; two or three times are usually enough."""


def with_known_ratio(model: PreTrainedModel, config: MixRankConfig) -> MixRankConfig:
    """Return a configuration with the ratio that its size asks for; one that names no size, as it is.

    Args:
        model: The original.
        config: What the user asks for.

    Raises:
        ValueError: if the size is not below that of the model, or the model that is named cannot be counted.
        OSError: if the model that is named does not exist.
    """
    if config.target_parameters is None and config.like is None:
        return config
    count = config.target_parameters if config.like is None else parameters_like(config.like)
    assert count is not None  # one of the two is given
    total = count_parameters(model)
    if count >= total:
        raise ValueError(
            f"{ModelSize(count, config.like or '')} is not smaller than the {type(model).__name__} to compress, which has "
            f"{total:,} parameters. Name a smaller size, or start from a larger model."
        )
    # A copy rather than a new configuration, which could not have both a size and a ratio.
    known = copy.copy(config)
    known.target_parameters, known.compression_ratio = count, 1 - count / total
    return known


def size_of(config: MixRankConfig) -> ModelSize | None:
    """Return the size that a configuration asks for, after `with_known_ratio`; None if it asks for a ratio."""
    return None if config.target_parameters is None else ModelSize(config.target_parameters, config.like or "")


def solve_to_size(
    budget: RankBudget, problem: AllocationProblem, allocation: str, sites: Sequence[Site]
) -> Allocation:
    """Decide the structure of every layer; under a budget that is a size, removed hidden units leave room for more.

    The budget counts weights. The biases of hidden units that are removed are spent on weights, so that small models, of
    which biases are a larger part, come as close to the size as large ones.

    Args:
        budget: The budget.
        problem: What its `problem` returns.
        allocation: Name of the allocator.
        sites: Layers that are decided together.
    """
    best = budget.solve(problem, allocation)
    if budget.size is None:
        return best
    room = removed_biases(sites, best.choices)
    for _ in range(_TRIES):
        size = dataclasses.replace(budget.size, parameters=budget.size.parameters + room)
        wider = dataclasses.replace(budget, size=size)
        found = wider.solve(dataclasses.replace(problem, budget=wider.free_budget), allocation)
        freed = removed_biases(sites, found.choices)
        fits = found.cost - freed <= budget.budget
        if fits and found.cost > best.cost:
            best = found
        if freed == room or (fits and freed < room):
            break
        # With more to spend, fewer units are removed, and fewer biases with them.
        room = freed
    return best
