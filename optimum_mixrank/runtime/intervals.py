"""Confidence intervals of shares of images."""

from __future__ import annotations

import math


Z95 = 1.959963984540054
"""Within so many standard deviations lies 95 % of a normal distribution."""

Z95_ONE_SIDED = 1.6448536269514722
"""Below so many standard deviations lies 95 % of a normal distribution."""


def wilson_interval(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of independent images, by default at 95 %.

    It stays within [0, 1], holds the share, and is not empty for shares of 0 and 1 (Wilson 1927).

    Args:
        share: The observed share, in [0, 1].
        count: Number of images.
        z: Standard deviations, see `Z95`.

    Raises:
        ValueError: if there is no image.
    """
    _check_count(count)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # At 0 and 1 the share itself is an end of the interval, which rounding would miss.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def paired_interval(gained: float, lost: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Return the interval of the difference of two models' accuracies on the same images, by default at 95 %.

    By the method of Agresti and Min (2005): half an image is added to each of the four outcomes, so that the interval is
    not empty where both models are right on the same images.

    Args:
        gained: Share of images that only the second model classifies correctly.
        lost: Share of images that only the first model classifies correctly.
        count: Number of images.
        z: Standard deviations, see `Z95`.

    Raises:
        ValueError: if there is no image.
    """
    _check_count(count)
    total = count + 2
    up, down = (gained * count + 0.5) / total, (lost * count + 0.5) / total
    half = z * math.sqrt((up + down - (up - down) ** 2) / total)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count={count} images have no share; evaluate at least one.")
