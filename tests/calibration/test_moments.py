"""Streaming moments against numpy's on the whole data, in float64."""

import numpy as np
import pytest
import torch

from optimum_mixrank.calibration.moments import MeanInputAccumulator, MomentAccumulator, PairAccumulator


BATCHES = {"one": [60], "even": [20, 20, 20], "uneven": [1, 37, 2, 20], "single vectors": [1] * 60}


def samples(count=60, features=7, mean=0.0, spread=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, features, generator=generator, dtype=torch.float64) @ mixing
    return (mean + spread * noise).to(dtype)


def accumulate(vectors, sizes, **kwargs):
    accumulator = MomentAccumulator(**kwargs)
    for batch in vectors.split(sizes):
        accumulator.update(batch)
    return accumulator


def reference(vectors):
    """Mean and covariance of the very values that were passed."""
    data = vectors.double().reshape(-1, vectors.shape[-1]).numpy()
    return torch.from_numpy(data.mean(0)), torch.from_numpy(np.atleast_2d(np.cov(data, rowvar=False, bias=True)))


def assert_moments(accumulator, vectors, rtol=1e-5):
    mean, covariance = reference(vectors)
    scale = covariance.abs().max().item()
    assert accumulator.mean().dtype == accumulator.covariance().dtype == torch.float64
    torch.testing.assert_close(accumulator.mean(), mean, rtol=0, atol=rtol * scale**0.5)
    torch.testing.assert_close(accumulator.covariance(), covariance, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
def test_mean_and_covariance(sizes):
    vectors = samples(mean=1.5)
    accumulator = accumulate(vectors, sizes)
    assert accumulator.count == 60
    assert_moments(accumulator, vectors)
    assert torch.equal(accumulator.covariance(), accumulator.covariance().T)


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
def test_variance_is_the_diagonal_of_the_covariance(sizes):
    vectors = samples(mean=1.5)
    accumulator = accumulate(vectors, sizes, full=False)
    mean, covariance = reference(vectors)
    torch.testing.assert_close(accumulator.mean(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(accumulator.covariance(), covariance.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
def test_mean_alone(sizes):
    vectors = samples(mean=1.5)
    accumulator = accumulate(vectors, sizes, products=False)
    torch.testing.assert_close(accumulator.mean(), reference(vectors)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="made for the mean alone"):
        accumulator.covariance()


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    ("mean", "spread"), [(1e4, 1e-1), (-1e3, 1e-2), (1e6, 10.0)], ids=["1e4±1e-1", "-1e3±1e-2", "1e6±1e1"]
)
def test_a_mean_much_larger_than_the_spread_cancels_nothing(mean, spread, sizes):
    # Mean squares are 1e10 times the variances; uncentred float32 sums would hold nothing of them.
    vectors = samples(mean=mean, spread=spread)
    assert_moments(accumulate(vectors, sizes), vectors, rtol=1e-4)


def test_float64_keeps_its_precision():
    vectors = samples(mean=10, dtype=torch.float64)
    assert_moments(accumulate(vectors, [7, 53]), vectors, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_accumulated_in_full(dtype):
    # 400 is inside float16, its square is not.
    vectors = samples(count=3000, mean=400, spread=20, dtype=dtype)
    assert_moments(accumulate(vectors, [1000, 2000]), vectors)


def test_autocast_does_not_reach_the_sums():
    vectors = samples(count=200, mean=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator = accumulate(vectors, [50, 150])
    assert_moments(accumulator, vectors)


@pytest.mark.parametrize("shape", [(60, 7), (4, 15, 7), (2, 5, 6, 7)], ids=["2-D", "3-D", "4-D"])
def test_leading_dimensions_are_vectors(shape):
    vectors = samples()
    accumulator = MomentAccumulator()
    accumulator.update(vectors.reshape(shape))
    assert accumulator.count == 60
    assert_moments(accumulator, vectors)


def test_strided_input_that_requires_a_gradient():
    vectors = samples().T.contiguous().T.requires_grad_()
    accumulator = MomentAccumulator()
    accumulator.update(vectors)
    assert not accumulator.covariance().requires_grad
    assert_moments(accumulator, vectors.detach())


def test_the_input_is_not_changed():
    vectors = samples()
    before = vectors.clone()
    accumulate(vectors, [30, 30])
    assert torch.equal(vectors, before)


def test_one_vector():
    accumulator = MomentAccumulator()
    accumulator.update(torch.tensor([1.0, 2.0, 3.0]))
    assert accumulator.count == 1
    torch.testing.assert_close(accumulator.mean(), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert torch.equal(accumulator.covariance(), torch.zeros(3, 3, dtype=torch.float64))


def test_one_feature():
    vectors = samples(features=1)
    assert_moments(accumulate(vectors, [10, 50]), vectors)


@pytest.mark.parametrize("full", [True, False], ids=["covariance", "variance"])
def test_constant_vectors_have_no_spread(full):
    accumulator = accumulate(torch.full((60, 4), 0.1), [30, 30], full=full)
    assert (accumulator.covariance().abs() < 1e-15).all()
    torch.testing.assert_close(accumulator.mean(), torch.full((4,), 0.1, dtype=torch.float64))


def test_variance_is_never_negative():
    vectors = torch.full((3, 1), 0.1) + torch.tensor([[0.0], [1e-8], [0.0]])
    assert accumulate(vectors, [1, 2], full=False).covariance() >= 0


def test_empty_batches_count_nothing():
    vectors = samples()
    accumulator = accumulate(vectors, [0, 30, 0, 30])
    assert accumulator.count == 60
    assert_moments(accumulator, vectors)


@pytest.mark.parametrize("make", [MomentAccumulator, lambda: MomentAccumulator(full=False), MeanInputAccumulator])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("batch", [0, 1], ids=["first batch", "later batch"])
def test_nan_and_inf_are_noticed_and_stay_noticed(make, value, batch):
    accumulator = make()
    assert accumulator.is_finite
    for index in range(3):
        vectors = samples(features=3)[None]
        if index == batch:
            vectors[0, 5, 1] = value
        accumulator.update(vectors)
        assert accumulator.is_finite == (index < batch)


@pytest.mark.parametrize("accumulator", [MomentAccumulator(), MomentAccumulator(full=False)])
def test_nothing_seen(accumulator):
    for read in (accumulator.mean, accumulator.covariance):
        with pytest.raises(ValueError, match="No vectors have been seen"):
            read()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [[8], [1, 5, 2]], ids=["one", "uneven"])
def test_mean_input(sizes, dtype):
    inputs = samples(count=8 * 5).reshape(8, 5, 7).to(dtype)
    accumulator = MeanInputAccumulator()
    for batch in inputs.split(sizes):
        accumulator.update(batch)
    assert accumulator.count == 8
    assert accumulator.mean().dtype == torch.float64
    torch.testing.assert_close(accumulator.mean(), inputs.double().mean(0))


def test_mean_input_over_windows():
    inputs = samples(count=3 * 4 * 5).reshape(3, 4, 5, 7)
    accumulator = MeanInputAccumulator()
    accumulator.update(inputs[:2])
    accumulator.update(inputs[2:])
    assert accumulator.count == 12
    torch.testing.assert_close(accumulator.mean(), inputs.double().reshape(12, 5, 7).mean(0))


def test_mean_input_of_one_token_per_image():
    inputs = samples(count=6)
    accumulator = MeanInputAccumulator()
    accumulator.update(inputs)
    torch.testing.assert_close(accumulator.mean(), inputs.double().mean(0)[None])


def test_mean_input_does_not_keep_the_input():
    inputs = samples(dtype=torch.float64)[None]
    before = inputs.clone()
    accumulator = MeanInputAccumulator()
    for _ in range(2):
        accumulator.update(inputs)
    assert torch.equal(inputs, before)
    torch.testing.assert_close(accumulator.mean(), before[0])


def test_mean_input_of_images_of_several_sizes():
    accumulator = MeanInputAccumulator()
    accumulator.update(torch.zeros(2, 5, 7))
    message = r"number of tokens changed from 5 to 6; .* images of one size\. Use metric='second_moment'"
    with pytest.raises(ValueError, match=message):
        accumulator.update(torch.zeros(2, 6, 7))


def test_mean_input_without_inputs():
    with pytest.raises(ValueError, match="No inputs have been seen"):
        MeanInputAccumulator().mean()


@pytest.mark.parametrize("shared", [False, True], ids=["own inputs", "shared inputs"])
def test_pairs_have_the_moments_of_all_vectors_at_once(shared):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 100
    targets = torch.randn(40, 4, generator=generator, dtype=torch.float64) - 50
    leader = PairAccumulator()
    pair = PairAccumulator(leader) if shared else leader
    for x, t in zip(inputs.view(8, 5, 6).split(3), targets.view(8, 5, 4).split(3), strict=True):
        if shared:
            leader.update(x, 2 * t)
        pair.update(x, t)
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    for found, expected in zip(pair.means(), (input_mean, target_mean), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    covariance, cross = pair.moments()
    torch.testing.assert_close(
        covariance, inputs.T @ inputs / 40 - torch.outer(input_mean, input_mean), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(
        cross, targets.T @ inputs / 40 - torch.outer(target_mean, input_mean), rtol=0, atol=1e-9
    )
    about_zero = pair.moments(centred=False)
    torch.testing.assert_close(about_zero[0], inputs.T @ inputs / 40, rtol=1e-12, atol=0)
    torch.testing.assert_close(about_zero[1], targets.T @ inputs / 40, rtol=1e-12, atol=0)
    power = targets.square().sum(1).mean()
    torch.testing.assert_close(pair.target_power(centred=False), power, rtol=1e-12, atol=0)
    torch.testing.assert_close(pair.target_power(), power - target_mean.square().sum(), rtol=1e-9, atol=0)
    assert pair.is_finite


def test_pairs_that_nothing_was_seen_of():
    with pytest.raises(ValueError, match="No vectors have been seen"):
        PairAccumulator().moments()
