"""Intervals, compared with their definitions."""

import math

import pytest

from optimum_mixrank.runtime.intervals import Z95, paired_interval, wilson_interval


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (0.9, 1000), (0.0, 20), (1.0, 20)])
def test_wilson_ends_are_as_far_from_the_share_as_their_own_deviation_allows(share, count):
    """Each end p solves |share - p| = z sqrt(p (1 - p) / n)."""
    for end in wilson_interval(share, count):
        assert abs(share - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / count), abs=1e-9)


def test_a_share_lies_in_its_interval():
    for count in range(1, 200):
        for share in (0.0, 1 / count, 1.0):
            low, high = wilson_interval(share, count)
            assert 0 <= low <= share <= high <= 1


def test_a_paired_interval_holds_the_change_and_narrows_with_images():
    widths = []
    for count in (100, 1000, 10_000):
        low, high = paired_interval(0.02, 0.05, count)
        assert low < -0.03 < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    # Wald's interval, which it approaches.
    half = Z95 * math.sqrt((0.07 - 0.03**2) / 10_000)
    assert paired_interval(0.02, 0.05, 10_000) == pytest.approx((-0.03 - half, -0.03 + half), abs=2e-4)


def test_equal_models_have_an_interval_around_zero():
    low, high = paired_interval(0.0, 0.0, 50)
    assert low == -high and 0 < high < 0.06


@pytest.mark.parametrize("interval", [lambda: wilson_interval(0.5, 0), lambda: paired_interval(0.1, 0.1, 0)])
def test_no_images(interval):
    with pytest.raises(ValueError, match="count=0"):
        interval()
