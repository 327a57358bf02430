"""Every metric against its definition on explicit data, in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mixrank.allocation import LayerProfile
from optimum_mixrank.checkpoint.factorize import factored_linear
from optimum_mixrank.decomposition import METRICS, LayerStatistics, Metric, Statistic, corrected_bias
from optimum_mixrank.decomposition.factorization import decompose_by_input, decompose_by_output, root_of_covariance


SHAPES = {"square": (9, 9), "tall": (14, 9), "wide": (9, 14), "one row": (1, 9), "one column": (9, 1)}
ALL_METRICS = ["svd", "diagonal", "mean_input", "second_moment", "kfac"]
DATA_METRICS = ["diagonal", "mean_input", "second_moment"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def statistics_of(inputs, weight):
    """All statistics of inputs `[images, tokens, n]`, from their definitions."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    centred = flat - flat.mean(0)
    outputs = centred @ weight.T
    return LayerStatistics(
        num_tokens=len(flat),
        input_mean=flat.mean(0),
        input_variance=centred.square().mean(0),
        input_covariance=centred.T @ centred / len(flat),
        output_covariance=outputs.T @ outputs / len(flat),
        representative_input=inputs.mean(0),
        gradient_moment=gradient_moment(len(weight)),
        input_gradient_moment=weight.T @ gradient_moment(len(weight)) @ weight,
        gradient_energy=gradient_moment(len(weight)).trace(),
    )


def gradient_moment(m):
    """Some second moment of output gradients, far from the identity."""
    generator = torch.Generator().manual_seed(m)
    root = random(generator, 3 * m, m) * torch.logspace(0, -1, m, dtype=torch.float64)
    return root.T @ root / len(root)


def correlated(generator, images, tokens, n):
    """Inputs with correlated features, uneven spread and a mean."""
    spread = torch.logspace(0, -2, n, dtype=torch.float64)
    return random(generator, images, tokens, n) * spread @ random(generator, n, n) + random(generator, n)


@pytest.fixture(params=SHAPES)
def layer(request, generator):
    m, n = SHAPES[request.param]
    weight = random(generator, m, n)
    inputs = correlated(generator, 40, 5, n)
    return weight, inputs, statistics_of(inputs, weight)


def truncation(decomposition, rank):
    return decomposition.left[:, :rank] @ decomposition.right[:rank]


def squared(matrix):
    return matrix.square().sum().item()


def output_error(weight, inputs, approximation, bias=0.0):
    flat = inputs.reshape(-1, inputs.shape[-1])
    return squared(flat @ (weight - approximation).T - bias) / len(flat)


def test_svd_is_the_truncated_svd_of_the_weight(layer):
    weight, _, _ = layer
    decomposition = METRICS.create("svd").decompose(weight, None)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(decomposition.energies, S.square())
    for rank in range(len(S) + 1):
        torch.testing.assert_close(truncation(decomposition, rank), U[:, :rank] * S[:rank] @ Vh[:rank])


def test_diagonal_is_the_truncated_svd_under_the_spread_of_features(layer):
    weight, inputs, statistics = layer
    spread = inputs.reshape(-1, inputs.shape[-1]).std(0, correction=0)
    decomposition = METRICS.create("diagonal").decompose(weight, statistics)
    U, S, Vh = torch.linalg.svd(weight * spread, full_matrices=False)
    torch.testing.assert_close(decomposition.energies, S.square(), rtol=1e-9, atol=1e-12)
    for rank in range(1, len(S) + 1):
        expected = U[:, :rank] * S[:rank] @ Vh[:rank] / spread
        torch.testing.assert_close(truncation(decomposition, rank), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tokens", [3, 40], ids=["fewer tokens than features", "more tokens than features"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mean_input_is_the_svd_of_the_output_on_the_representative_input(generator, shape, tokens):
    m, n = shape
    weight, inputs = random(generator, m, n), correlated(generator, 20, tokens, n)
    decomposition = METRICS.create("mean_input").decompose(weight, statistics_of(inputs, weight))
    representative = inputs.mean(0)
    centred = representative - representative.mean(0)
    U, S, Vh = torch.linalg.svd(weight @ centred.T, full_matrices=False)
    size = min(m, n)
    energies = torch.zeros(size, dtype=torch.float64)
    energies[: min(size, len(S))] = S[:size].square() / tokens
    torch.testing.assert_close(decomposition.energies, energies, rtol=1e-6, atol=1e-10 * energies[0].item())
    for rank in range(1, size + 1):
        found = truncation(decomposition, rank) @ centred.T
        torch.testing.assert_close(found, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-6, atol=1e-6 * S[0].item())
    torch.testing.assert_close(truncation(decomposition, size), weight, rtol=0, atol=1e-7)


def test_second_moment_is_the_least_squares_solution_with_bias(layer):
    weight, inputs, statistics = layer
    decomposition = METRICS.create("second_moment").decompose(weight, statistics)
    flat = inputs.reshape(-1, inputs.shape[-1])
    outputs = flat @ weight.T
    centred = outputs - outputs.mean(0)
    total = squared(centred) / len(flat)
    # The least error of any rank-r map with any bias: outputs themselves cannot be approximated better.
    singular_values = torch.linalg.svdvals(centred)
    for rank in range(min(weight.shape) + 1):
        least = singular_values[rank:].square().sum().item() / len(flat)
        approximation = truncation(decomposition, rank)
        bias = corrected_bias(
            weight,
            weight.new_zeros(len(weight)),
            decomposition.left[:, :rank] @ decomposition.right[:rank],
            flat.mean(0),
        )
        error = output_error(weight, inputs, approximation, bias)
        assert error == pytest.approx(least, rel=1e-6, abs=1e-11 * total)
        assert error == pytest.approx(decomposition.energies[rank:].sum().item(), rel=1e-6, abs=1e-11 * total)


def test_centring_is_never_worse(layer):
    weight, inputs, statistics = layer
    flat = inputs.reshape(-1, inputs.shape[-1])
    uncentred = dataclasses.replace(
        statistics,
        input_covariance=flat.T @ flat / len(flat),
        output_covariance=weight @ flat.T @ flat @ weight.T / len(flat),
    )
    metric = METRICS.create("second_moment")
    found, without_centring = metric.decompose(weight, statistics), metric.decompose(weight, uncentred)
    for rank in range(1, min(weight.shape)):
        bias = corrected_bias(
            weight, weight.new_zeros(len(weight)), found.left[:, :rank] @ found.right[:rank], flat.mean(0)
        )
        without = output_error(weight, inputs, truncation(without_centring, rank))
        assert output_error(weight, inputs, truncation(found, rank), bias) < without


@pytest.mark.parametrize("shape", [(9, 9), (14, 9), (9, 14)], ids=["square", "tall", "wide"])
def test_both_sides_and_the_square_case_agree(generator, shape):
    m, n = shape
    weight, inputs = random(generator, m, n), correlated(generator, 40, 5, n)
    statistics = statistics_of(inputs, weight)
    chosen = METRICS.create("second_moment").decompose(weight, statistics)
    by_input = decompose_by_input(weight, root_of_covariance(statistics.input_covariance))
    by_output = decompose_by_output(weight, statistics.output_covariance)
    for other in (by_input, by_output):
        torch.testing.assert_close(chosen.energies, other.energies, rtol=1e-6, atol=1e-10)
        for rank in range(1, min(m, n) + 1):
            torch.testing.assert_close(truncation(chosen, rank), truncation(other, rank), rtol=1e-5, atol=1e-7)


def test_second_moment_has_the_least_output_error_of_all_metrics(layer):
    weight, inputs, statistics = layer
    mean = statistics.input_mean
    for rank in range(1, min(weight.shape)):
        errors = {}
        for name in METRICS:
            decomposition = METRICS.create(name).decompose(weight, statistics)
            A, B = decomposition.factors(rank)
            errors[name] = output_error(
                weight, inputs, B @ A, corrected_bias(weight, weight.new_zeros(len(weight)), B @ A, mean)
            )
        assert min(errors, key=errors.get) == "second_moment"


def test_statistics_about_zero(layer):
    weight, inputs, statistics = layer
    flat = inputs.reshape(-1, inputs.shape[-1])
    outputs = flat @ weight.T
    about_zero = statistics.about_zero(weight)
    assert statistics.centred and not about_zero.centred
    torch.testing.assert_close(about_zero.input_variance, flat.square().mean(0))
    torch.testing.assert_close(about_zero.input_covariance, flat.T @ flat / len(flat))
    torch.testing.assert_close(about_zero.output_covariance, outputs.T @ outputs / len(flat))
    assert about_zero.num_tokens == statistics.num_tokens
    alone = LayerStatistics(3, input_mean=statistics.input_mean).about_zero(weight)
    assert alone.input_variance is alone.input_covariance is alone.output_covariance is None


def test_second_moment_about_zero_is_the_least_squares_solution_without_bias(layer):
    weight, inputs, statistics = layer
    decomposition = METRICS.create("second_moment").decompose(weight, statistics.about_zero(weight))
    flat = inputs.reshape(-1, inputs.shape[-1])
    singular_values = torch.linalg.svdvals(flat @ weight.T)
    for rank in range(min(weight.shape) + 1):
        least = singular_values[rank:].square().sum().item() / len(flat)
        error = output_error(weight, inputs, truncation(decomposition, rank))
        assert error == pytest.approx(least, rel=1e-6, abs=1e-11 * singular_values[0].item() ** 2)


def test_mean_input_about_zero_is_the_uncentred_svd(layer):
    weight, inputs, statistics = layer
    decomposition = METRICS.create("mean_input").decompose(weight, statistics.about_zero(weight))
    expected = torch.zeros(min(weight.shape), dtype=torch.float64)
    values = torch.linalg.svdvals(weight @ inputs.mean(0).T).square() / inputs.shape[1]
    expected[: len(values)] = values[: len(expected)]
    torch.testing.assert_close(decomposition.energies, expected, rtol=1e-6, atol=1e-9 * expected[0].item())


def singular_inputs(kind, generator, n):
    inputs = correlated(generator, 30, 4, n)
    if kind == "fewer vectors than features":
        return inputs[:1, :3]
    if kind == "one vector":
        return inputs[:1, :1]
    if kind == "dead channels":
        inputs[..., ::2] = 0
    if kind == "constant channels":
        inputs[..., ::2] = 3.5
    if kind == "duplicate channels":
        inputs[..., 1] = inputs[..., 0]
    if kind == "constant inputs":
        inputs[:] = inputs[0, 0]
    if kind == "dead inputs":
        inputs[:] = 0
    return inputs


@pytest.mark.parametrize("shape", [(9, 9), (14, 9), (9, 14)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("metric", DATA_METRICS)
@pytest.mark.parametrize(
    "kind",
    [
        "fewer vectors than features",
        "one vector",
        "dead channels",
        "constant channels",
        "duplicate channels",
        "constant inputs",
        "dead inputs",
    ],
)
def test_singular_data(generator, kind, metric, shape):
    m, n = shape
    weight = random(generator, m, n)
    inputs = singular_inputs(kind, generator, n)
    statistics = statistics_of(inputs, weight)
    if kind in ("constant inputs", "dead inputs", "one vector"):
        # The exact statistics: means of constants are rounded above.
        statistics = dataclasses.replace(
            statistics,
            input_mean=inputs[0, 0],
            input_variance=torch.zeros(n, dtype=torch.float64),
            input_covariance=torch.zeros(n, n, dtype=torch.float64),
            output_covariance=torch.zeros(m, m, dtype=torch.float64),
            representative_input=inputs[0, :1].expand(4, -1),
        )
    decomposition = METRICS.create(metric).decompose(weight, statistics)
    losses, size = decomposition.losses(), min(m, n)
    assert decomposition.left.shape == (m, size) and decomposition.right.shape == (size, n)
    for tensor in (decomposition.left, decomposition.right, decomposition.energies):
        assert torch.isfinite(tensor).all()
    assert (losses[1:] <= losses[:-1]).all() and losses[-1] == 0
    torch.testing.assert_close(truncation(decomposition, size), weight, rtol=1e-9, atol=1e-9)
    if kind in ("constant inputs", "dead inputs", "one vector"):
        # Data that says nothing leaves the weight's own SVD.
        assert (losses == 0).all()
        reference = METRICS.create("svd").decompose(weight, None)
        torch.testing.assert_close(truncation(decomposition, 4), truncation(reference, 4))


@pytest.mark.parametrize("metric", METRICS)
def test_zero_weight(metric):
    weight = torch.zeros(6, 4, dtype=torch.float64)
    inputs = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decomposition = METRICS.create(metric).decompose(weight, statistics_of(inputs, weight))
    assert (decomposition.losses() == 0).all()
    assert all(torch.isfinite(factor).all() and (factor == 0).all() for factor in decomposition.factors(2))


@pytest.mark.parametrize("metric", METRICS)
def test_required_statistics_suffice(layer, metric):
    weight, _, statistics = layer
    required = METRICS.create(metric).required_statistics(*weight.shape)
    given = {statistic.value: getattr(statistics, statistic.value) for statistic in required}
    decomposition = METRICS.create(metric).decompose(weight, LayerStatistics(statistics.num_tokens, **given))
    assert decomposition.left.shape == (len(weight), min(weight.shape))


@pytest.mark.parametrize(("shape", "smaller"), [((9, 9), "input"), ((14, 9), "input"), ((9, 14), "output")])
def test_second_moment_asks_for_the_smaller_side(shape, smaller):
    required = METRICS.create("second_moment").required_statistics(*shape)
    assert required == {Statistic.INPUT_MEAN, Statistic(f"{smaller}_covariance")}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_with_data_require_the_mean_for_the_bias(name):
    metric = METRICS.create(name)
    assert metric.uses_data == (Statistic.INPUT_MEAN in metric.required_statistics(8, 8))


@pytest.mark.parametrize("metric", DATA_METRICS)
@pytest.mark.parametrize("statistics", [None, LayerStatistics(3)], ids=["none", "empty"])
def test_missing_statistic_is_named(metric, statistics):
    with pytest.raises(ValueError, match=r"The statistic '\w+' was not collected; calibrate with the metric"):
        METRICS.create(metric).decompose(torch.eye(3, dtype=torch.float64), statistics)


def test_unknown_metric_lists_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"metric='svdd' is unknown; choose one of 'svd', 'diagonal', 'mean_input', 'second_moment', 'kfac'\.",
    ):
        METRICS.create("svdd")


def test_a_name_can_be_registered_once(monkeypatch):
    class Other(Metric):
        name = "other"

        def required_statistics(self, out_features, in_features):
            return frozenset()

        def decompose(self, weight, statistics):
            raise NotImplementedError

    monkeypatch.setattr(METRICS, "_classes", dict(METRICS))
    METRICS.register(Other)
    assert isinstance(METRICS.create("other"), Other)
    with pytest.raises(ValueError, match="metric='other' is registered already"):
        METRICS.register(Other)


SIZES = st.integers(1, 9)


@st.composite
def deficient_layers(draw):
    """A weight `[m, n]` and inputs `[images, tokens, n]` of which one, the other or both lack directions."""
    m, n = draw(SIZES), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight, inputs = random(generator, m, n), correlated(generator, 12, 4, n)
    rank = draw(st.integers(0, min(m, n)))
    if draw(st.booleans()):
        weight = random(generator, m, rank) @ random(generator, rank, n)
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, n - 1))] = 0
    if draw(st.booleans()):
        weight[draw(st.integers(0, m - 1))] = 0
    dead = draw(st.sampled_from(["none", "one", "all"]))
    if dead != "none":
        inputs[..., : 1 if dead == "one" else n] = 0.5
    weight = weight * draw(st.sampled_from([1.0, 1e-40, 1e20]))
    return weight, inputs, draw(st.sampled_from([1.0, 0.0, 1e-80]))


def statistics(weight, inputs, gradients):
    found = statistics_of(inputs, weight)
    names = ("gradient_moment", "input_gradient_moment", "gradient_energy")
    scaled = {name: getattr(found, name) * gradients for name in names}
    # As collected: of a layer with more outputs than inputs, the moment of the output's gradients is not known.
    unknown = ("gradient_moment",) if weight.shape[0] > weight.shape[1] else ("input_gradient_moment",)
    return dataclasses.replace(found, **scaled | dict.fromkeys(unknown))


@pytest.mark.parametrize("metric", ALL_METRICS)
@given(layer=deficient_layers())
def test_all_ranks_have_losses_and_factors(metric, layer):
    weight, inputs, gradients = layer
    m, n = weight.shape
    found = METRICS.create(metric).decompose(weight, statistics(weight, inputs, gradients))
    # Construction checks the number and the order of the losses.
    for losses in (found.losses(), found.tails()):
        LayerProfile("layer", m, n, losses.numpy())
    assert (weight - truncation(found, min(m, n))).abs().max() <= 1e-5 * weight.abs().max()
    if metric == "second_moment":
        total = output_error(weight, centred(inputs), 0)
        for rank in range(min(m, n) + 1):
            error = output_error(weight, centred(inputs), truncation(found, rank))
            assert error == pytest.approx(found.tails()[rank].item(), rel=1e-6, abs=1e-9 * total)


def centred(inputs):
    return inputs - inputs.mean((0, 1))


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("metric", ALL_METRICS)
@given(layer=deficient_layers())
def test_all_ranks_can_be_stored(metric, layout, layer):
    weight, inputs, gradients = layer
    m, n = weight.shape
    found = METRICS.create(metric).decompose(weight, statistics(weight, inputs, gradients))
    dense = torch.nn.Linear(n, m)
    dense.weight.data = weight.float()
    for rank in range(1, min(m - 1 if layout == "pivoted" else m, n) + 1):
        A, B = found.truncated(rank, torch.float32).factors(rank)
        factored = factored_linear(dense, A, B, layout, inputs.mean((0, 1)))
        expected = truncation(found, rank)
        assert torch.isfinite(factored.bias).all()
        size = max(weight.abs().max().item(), expected.abs().max().item())
        assert (factored.product() - expected).abs().max() <= 1e-4 * size + 1e-37
