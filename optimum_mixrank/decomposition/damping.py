"""The scale of the inputs that the anchor of a layer refers to.

A few channels may have variances that are thousands of times those of the others, as in DINOv3 and SigLIP2. The mean of
the diagonal is then theirs, and a share of it holds all the others fast.

The damping of the Fisher information keeps to the mean: with outliers the measure comes closer to the plain output
error, which costs little, and a smaller damping would trust the gradients of few images too much.
"""

from __future__ import annotations

from torch import Tensor


_OUTLIERS = 16
"""One channel of so many may be an outlier."""

_LEAST = 1e-3
"""Smallest scale as a share of the mean, for moments of which few channels hold everything."""


def typical_scale(diagonal: Tensor) -> Tensor:
    """Return the mean of a diagonal, `[n]`, whose largest entries count no more than the largest of the others, `[]`.

    The largest are one in sixteen. Without outliers this is close to the mean.
    """
    mean = diagonal.mean()
    outliers = len(diagonal) // _OUTLIERS
    if not outliers:
        return mean
    limit = diagonal.kthvalue(len(diagonal) - outliers).values
    return diagonal.clamp_max(limit).mean().clamp_min(_LEAST * mean)
