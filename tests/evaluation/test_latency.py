import pytest
import torch
from models import pixels, tiny_swin, tiny_vit
from torch import nn

from optimum_mixrank.evaluation.latency import Latency, measure_latency, median_interval, time_ratio


class Watched(nn.Module):
    """Notes its name whenever it runs."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, pixel_values):
        self.calls.append((self.name, self.training, torch.is_grad_enabled()))
        return pixel_values


def test_models_take_turns_and_are_left_as_they_were():
    calls = []
    models = {name: Watched(name, calls) for name in ("a", "b", "c")}
    models["b"].eval()
    result = measure_latency(models, {"pixel_values": pixels()}, repeats=6, warmup=2, min_seconds=0.0)
    assert [(name, latency.batch_size, len(latency.seconds)) for name, latency in result.items()] == [
        ("a", 4, 6),
        ("b", 4, 6),
        ("c", 4, 6),
    ]
    # Two warm-up passes and one to see how long they take, then one pass each per repetition.
    timed = [name for name, *_ in calls[9:]]
    assert timed == list("abcbcacab" * 2)
    assert not any(training or grad for _, training, grad in calls)
    assert models["a"].training and not models["b"].training


def test_short_passes_are_repeated_and_all_models_as_often():
    calls = []
    models = {name: Watched(name, calls) for name in ("a", "b")}
    measure_latency(models, {"pixel_values": pixels()}, repeats=6, warmup=1, min_seconds=0.001)
    counts = {name: [each for each, *_ in calls].count(name) for name in models}
    assert counts["a"] == counts["b"] > 2 + 6


@pytest.mark.parametrize("tiny", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_real_models(tiny):
    small, large = tiny(), tiny()
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "interpolate_pos_encoding": True}
    result = measure_latency({"small": small, "large": large}, inputs, repeats=6, min_seconds=0.0)
    for latency in result.values():
        low, high = latency.quartiles
        assert 0 < min(latency.seconds) <= low <= latency.median <= high <= max(latency.seconds)
        assert latency.images_per_second == pytest.approx(2 / latency.median)
    ratio = time_ratio(result["small"], result["large"])
    assert ratio.low <= ratio.median <= ratio.high


def test_ratios_are_paired():
    slow = Latency(1, tuple(2.0**i for i in range(20)))
    fast = Latency(1, tuple(0.5 * 2.0**i for i in range(20)))
    ratio = time_ratio(fast, slow)
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="20 and 6 repetitions cannot be paired"):
        time_ratio(slow, Latency(1, (1.0,) * 6))


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33))])
def test_interval_of_the_median_as_tabulated(n, ranks):
    values = torch.randperm(n, generator=torch.Generator().manual_seed(0)) + 1
    assert median_interval(values.tolist()) == ranks


def test_the_interval_covers_the_median_as_often_as_it_says():
    draws = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0)).exp()
    intervals = [median_interval(row) for row in draws.tolist()]
    # exp(0) is the median of exp(N(0, 1)); exact coverage for n = 20 is 95.86 %.
    assert sum(low <= 1 <= high for low, high in intervals) / 2000 == pytest.approx(0.9586, abs=0.015)


def test_too_little_to_say_anything():
    with pytest.raises(ValueError, match="repeats=5 is too few for an interval; use 6 or more"):
        measure_latency({}, {"pixel_values": pixels()}, repeats=5)
    with pytest.raises(ValueError, match="warmup=0 is not positive"):
        measure_latency({}, {"pixel_values": pixels()}, warmup=0)
    with pytest.raises(ValueError, match="5 values are too few for an interval of 95%"):
        median_interval([1.0] * 5)
