"""Moments merged from several processes against float64 references of all vectors at once.

The processes are threads here, which exchange values at a barrier.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from optimum_mixrank.calibration.moments import MeanInputAccumulator, MomentAccumulator, PairAccumulator, merge_pairs
from optimum_mixrank.runtime.distributed import Processes


class Exchange:
    def __init__(self, count):
        self.values, self.barrier = [None] * count, threading.Barrier(count, timeout=60)


@dataclass(frozen=True)
class Threads(Processes):
    exchange: Exchange | None = None

    def gather(self, value):
        self.exchange.values[self.index] = value
        self.exchange.barrier.wait()
        values = list(self.exchange.values)
        self.exchange.barrier.wait()
        return values

    def sum_(self, tensor):
        return tensor.copy_(sum(self.gather(tensor.clone())))


def in_processes(parts, work):
    """Return the results of `work(part, processes)` in one process per part."""
    exchange, count = Exchange(len(parts)), len(parts)
    processes = [Threads(index, count, exchange=exchange) for index in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, parts, processes))


def vectors(count, size, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + mean


SPLITS = pytest.mark.parametrize(
    "sizes", [[20, 20], [1, 39], [0, 40], [13, 0, 27], [0, 0, 40]], ids=lambda sizes: "-".join(map(str, sizes))
)


@SPLITS
@pytest.mark.parametrize("mean", [0.0, 1e4], ids=["centred", "large mean"])
@pytest.mark.parametrize("full", [True, False], ids=["covariance", "variance"])
def test_mean_and_covariance(sizes, mean, full):
    x = vectors(40, 6, mean)

    def work(part, processes):
        moments = MomentAccumulator(full=full)
        for batch in part.split(8):
            moments.update(batch)
        moments.merge(processes)
        return moments

    merged = in_processes(x.split(sizes), work)
    covariance = torch.cov(x.T, correction=0)
    for moments in merged:
        assert moments.count == 40 and moments.is_finite
        torch.testing.assert_close(moments.mean(), x.mean(0), rtol=1e-14, atol=1e-13)
        expected = covariance if full else covariance.diagonal()
        torch.testing.assert_close(moments.covariance(), expected, rtol=1e-11, atol=1e-11)
        # All processes hold the same bits.
        assert torch.equal(moments.mean(), merged[0].mean())
        assert torch.equal(moments.covariance(), merged[0].covariance())


def test_parts_with_very_different_means():
    x = torch.cat([vectors(30, 4, -1e5), vectors(10, 4, 1e5, seed=1)])

    def work(part, processes):
        moments = MomentAccumulator()
        moments.update(part)
        moments.merge(processes)
        return moments.covariance()

    expected = torch.cov(x.T, correction=0)
    for covariance in in_processes(x.split([30, 10]), work):
        torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=0)


@SPLITS
@pytest.mark.parametrize("mean", [0.0, 1e4], ids=["centred", "large mean"])
@pytest.mark.parametrize("centred", [True, False])
def test_pairs_that_share_their_inputs(sizes, mean, centred):
    x, t, u = vectors(40, 5, mean), vectors(40, 3, -mean, seed=1), vectors(40, 4, seed=2)

    def work(part, processes):
        first = PairAccumulator()
        pairs = [first, PairAccumulator(first)]
        for inputs, *targets in zip(*(each.split(8) for each in part), strict=True):
            for pair, target in zip(pairs, targets, strict=True):
                if len(inputs):
                    pair.update(inputs, target)
        merge_pairs(pairs, processes)
        return [(*pair.means(), *pair.moments(centred), pair.target_power(centred)) for pair in pairs]

    parts = list(zip(*(each.split(sizes) for each in (x, t, u)), strict=True))
    merged = in_processes(parts, work)
    a = x - x.mean(0) * centred
    scale = 1.0 if centred else mean**2
    for results in merged:
        for target, (input_mean, target_mean, moment, cross, power) in zip((t, u), results, strict=True):
            b = target - target.mean(0) * centred
            torch.testing.assert_close(input_mean, x.mean(0), rtol=1e-14, atol=1e-13)
            torch.testing.assert_close(target_mean, target.mean(0), rtol=1e-14, atol=1e-13)
            torch.testing.assert_close(moment, a.T @ a / 40, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(cross, b.T @ a / 40, rtol=1e-11, atol=1e-11 + 1e-15 * scale)
            torch.testing.assert_close(power, b.square().sum() / 40, rtol=1e-11, atol=1e-11)
        for own, first in zip(results, merged[0], strict=True):
            assert all(torch.equal(value, other) for value, other in zip(own, first, strict=True))


@SPLITS
def test_mean_input(sizes):
    x = vectors(40 * 3, 5, 1e3).view(40, 3, 5)

    def work(part, processes):
        accumulator = MeanInputAccumulator()
        if len(part):
            accumulator.update(part)
        accumulator.merge(processes)
        return accumulator.mean()

    for mean in in_processes(x.split(sizes), work):
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=1e-12)


def test_nan_in_one_process_is_noticed_in_all():
    def work(part, processes):
        moments = MomentAccumulator()
        moments.update(part)
        moments.merge(processes)
        return moments.is_finite

    x = vectors(10, 3)
    x[7, 1] = torch.nan
    assert in_processes(x.split(5), work) == [False, False]


def test_nothing_seen_by_any_process():
    def work(part, processes):
        moments = MomentAccumulator()
        moments.merge(processes)
        return moments.count

    assert in_processes([None, None], work) == [0, 0]
