"""Options of layers that are decided together: which combinations are worth considering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def efficient(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the indices of options that no other one beats in both respects, by ascending cost and descending loss."""
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    return order[losses[order] < best]


def lower_hull(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the indices of options on the lower convex hull of loss over cost, by ascending cost.

    These are the options that minimise `loss + λ cost` for some multiplier λ.
    """
    hull: list[int] = []
    for index in efficient(costs, losses):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            # b is above the line from a to the new option.
            if (losses[b] - losses[a]) * (costs[index] - costs[a]) >= (losses[index] - losses[a]) * (
                costs[b] - costs[a]
            ):
                hull.pop()
            else:
                break
        hull.append(int(index))
    return np.array(hull, dtype=np.int64)


def combine(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the combinations of one option per layer that minimise `Σ loss + λ Σ cost` for some λ.

    Args:
        curves: Costs and losses of the options of each layer.

    Returns:
        Indices of options, `[combinations, layers]`, by ascending cost.
    """
    hulls = [lower_hull(*curve) for curve in curves]
    steps = []
    for layer, ((costs, losses), hull) in enumerate(zip(curves, hulls, strict=True)):
        slopes = -np.diff(losses[hull]) / np.diff(costs[hull])
        steps += [(-slope, layer, position + 1) for position, slope in enumerate(slopes)]
    current = np.array([hull[0] for hull in hulls], dtype=np.int64)
    found = [current.copy()]
    # Along a convex hull slopes fall, so that the steps of each layer come in their order.
    for _, layer, position in sorted(steps):
        current[layer] = hulls[layer][position]
        found.append(current.copy())
    return np.stack(found)
