"""Small allocation problems, many of them random, and slow references for them."""

from __future__ import annotations

import itertools

import numpy as np

from optimum_mixrank.allocation import AllocationProblem, LayerProfile
from optimum_mixrank.allocation.specs import LayerSpec


TOWER = [
    LayerSpec("query", 32, 32),
    LayerSpec("key", 32, 32),
    LayerSpec("value", 32, 32),
    LayerSpec("output", 32, 32),
    LayerSpec("fc1", 64, 32),
    LayerSpec("fc2", 32, 64),
]
"""The linear layers of a block of width 32."""


def tail_losses(rng: np.random.Generator, rank: int, scale: float = 1.0) -> np.ndarray:
    """Return the losses at rank 0, …, `rank` of a truncated SVD with random singular values, `[rank + 1]`."""
    energies = np.sort(rng.random(rank))[::-1] ** rng.uniform(0.5, 5)
    tail = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    return scale * tail / tail[0]


def layer(name: str, m: int, n: int, losses: np.ndarray | None = None, **bounds) -> LayerProfile:
    """Return a profile whose losses, unless given, fall linearly to zero."""
    rank = min(m, n)
    return LayerProfile(name, m, n, np.linspace(1.0, 0.0, rank + 1) if losses is None else losses, **bounds)


def random_problem(seed: int, layers: int = 4, sizes: tuple[int, ...] = (3, 5, 8, 12, 16)) -> AllocationProblem:
    """Return layers of awkward shapes with multiples, floors, ceilings and fixed ranks, and a random budget."""
    rng = np.random.default_rng(seed)
    profiles = []
    for index in range(layers):
        m, n = (int(size) for size in rng.choice(sizes, 2))
        bounds = {
            "min_rank": int(rng.integers(1, 3)),
            "rank_multiple": int(rng.choice([1, 1, 2, 3])),
            "fixed_rank": int(rng.integers(1, min(m, n) + 1)) if rng.random() < 0.15 else None,
            "max_rank": int(rng.integers(4, 8)) if rng.random() < 0.15 else None,
        }
        profiles.append(layer(f"layer{index}", m, n, tail_losses(rng, min(m, n), rng.uniform(0.2, 3)), **bounds))
    least = sum(min(profile.cost(rank) for rank in allowed_ranks(profile)) for profile in profiles)
    most = sum(profile.dense_cost for profile in profiles)
    return AllocationProblem(tuple(profiles), int(least + rng.uniform(0, 1) * (most - least)))


def allowed_ranks(profile: LayerProfile) -> list[int | None]:
    """Return the ranks, and None for dense, by ascending cost, found by trying every rank against every rule."""
    m, n = profile.out_features, profile.in_features
    saving = [r for r in range(1, min(m, n) + 1) if r * (m + n) < m * n]
    if profile.fixed_rank is not None:
        return [profile.fixed_rank] if profile.fixed_rank in saving else [None]
    highest = min(m, n) if profile.max_rank is None else profile.max_rank
    return [r for r in saving if r % profile.rank_multiple == 0 and profile.min_rank <= r <= highest] + [None]


def brute_force(problem: AllocationProblem) -> float:
    """Return the least total loss over all combinations within the budget."""
    best = np.inf
    for ranks in itertools.product(*(allowed_ranks(profile) for profile in problem.layers)):
        pairs = list(zip(problem.layers, ranks, strict=True))
        if sum(profile.cost(rank) for profile, rank in pairs) <= problem.budget:
            best = min(best, sum(profile.loss(rank) for profile, rank in pairs))
    return best


def dual_bound(problem: AllocationProblem) -> float:
    """Return the largest lower bound Σ min (loss + λ cost) - λ budget over every λ at which a layer changes its option."""
    options = [
        (np.array([p.loss(r) for r in allowed_ranks(p)]), np.array([p.cost(r) for r in allowed_ranks(p)], dtype=float))
        for p in problem.layers
    ]
    prices = {0.0}
    for losses, costs in options:
        for low, high in itertools.combinations(range(len(costs)), 2):
            prices.add((losses[low] - losses[high]) / (costs[high] - costs[low]))
    return max(sum((x + price * c).min() for x, c in options) - price * problem.budget for price in prices)


def largest_jump(problem: AllocationProblem) -> float:
    """Return the largest loss decrease of one step along the lower convex hull of a layer's loss over cost."""
    jump = 0.0
    for profile in problem.layers:
        points = [(profile.cost(rank), profile.loss(rank)) for rank in allowed_ranks(profile)]
        at = 0
        while at + 1 < len(points):
            slopes = [(points[at][1] - loss) / (cost - points[at][0]) for cost, loss in points[at + 1 :]]
            steepest = at + 1 + int(np.argmax(slopes))
            jump = max(jump, points[at][1] - points[steepest][1])
            at = steepest
    return jump


def unspent_steps(problem: AllocationProblem, ranks: dict[str, int | None]) -> list[str]:
    """Return the names of the layers whose next option would still fit."""
    left = problem.budget - problem.total_cost(ranks)
    names = []
    for profile in problem.layers:
        allowed = allowed_ranks(profile)
        following = allowed[allowed.index(ranks[profile.name]) + 1 :]
        if following and profile.cost(following[0]) - profile.cost(ranks[profile.name]) <= left:
            names.append(profile.name)
    return names
