"""The two-sided metric and the anchored solution against float64 references."""

import pytest
import torch

from optimum_mixrank.decomposition import (
    METRICS,
    LayerStatistics,
    OutputFisher,
    anchored_weight,
    damped,
    decompose_two_sided,
)


SHAPES = [(9, 6), (6, 9), (8, 8)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(generator, size, count=40):
    root = random(generator, count, size) * torch.logspace(0, -2, size, dtype=torch.float64)
    mixed = root @ random(generator, size, size)
    return mixed.T @ mixed / count


def loss(F, S, error):
    return torch.trace(F @ error @ S @ error.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tail_is_the_loss_and_no_perturbation_is_better(generator, shape):
    m, n = shape
    W, F, S = random(generator, m, n), moment(generator, m), moment(generator, n)
    decomposition = decompose_two_sided(W, F, S)
    tails = decomposition.tails()
    for rank in range(1, min(m, n) + 1):
        A, B = decomposition.factors(rank)
        best = loss(F, S, W - B @ A)
        torch.testing.assert_close(best, tails[rank], rtol=1e-6, atol=1e-9 * float(tails[0]))
        for scale in (1e-3, 1e-1):
            other = (B + scale * random(generator, *B.shape)) @ (A + scale * random(generator, *A.shape))
            assert loss(F, S, W - other) >= best * (1 - 1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_textbook_solution_with_symmetric_roots(generator, shape):
    m, n = shape
    W, F, S = random(generator, m, n), moment(generator, m), moment(generator, n)

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.sqrt()) @ vectors.T

    U, s, Vh = torch.linalg.svd(root(F) @ W @ root(S), full_matrices=False)
    textbook = torch.linalg.inv(root(F)) @ (U[:, :3] * s[:3]) @ Vh[:3] @ torch.linalg.inv(root(S))
    A, B = decompose_two_sided(W, F, S).factors(3)
    torch.testing.assert_close(B @ A, textbook, rtol=1e-6, atol=1e-8)


def test_output_covariance_serves_as_well(generator):
    W, F, S = random(generator, 5, 9), moment(generator, 5), moment(generator, 9)
    by_input, by_output = decompose_two_sided(W, F, S), decompose_two_sided(W, F, output_covariance=W @ S @ W.T)
    torch.testing.assert_close(by_input.energies, by_output.energies, rtol=1e-8, atol=1e-10)
    for rank in (1, 3, 5):
        first, second = (B @ A for A, B in (each.factors(rank) for each in (by_input, by_output)))
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


def test_without_gradients_it_is_the_one_sided_metric(generator):
    W, S = random(generator, 6, 6), moment(generator, 6)
    statistics = LayerStatistics(10, input_mean=torch.zeros(6).double(), input_covariance=S)
    expected = METRICS.create("second_moment").decompose(W, statistics).factors(2)
    found = decompose_two_sided(W, torch.eye(6).double(), S).factors(2)
    torch.testing.assert_close(found[1] @ found[0], expected[1] @ expected[0], rtol=1e-8, atol=1e-10)


def test_one_covariance_is_needed():
    with pytest.raises(ValueError, match="Either the covariance"):
        decompose_two_sided(torch.eye(3).double(), torch.eye(3).double())


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("outside", [False, True], ids=["columns of the weight", "other columns"])
@pytest.mark.parametrize("shape", [(9, 6), (7, 1), (40, 6)], ids=str)
def test_gradients_of_the_input_serve_as_well(generator, shape, outside, damping):
    m, n = shape
    W, S, F = random(generator, m, n), moment(generator, n), moment(generator, m)
    if outside:
        # What the gradients of the input do not tell of is taken to be alike in all directions.
        Q = torch.linalg.qr(W, mode="complete").Q
        F = Q[:, :n] @ moment(generator, n) @ Q[:, :n].T + 0.7 * Q[:, n:] @ Q[:, n:].T
    other = random(generator, m, n) if outside else W @ (torch.eye(n) + 0.1 * random(generator, n, n))
    found = OutputFisher.of(
        W, LayerStatistics(10, input_gradient_moment=W.T @ F @ W, gradient_energy=F.trace()), damping
    ).decompose(other, S)
    expected = OutputFisher.of(W, LayerStatistics(10, gradient_moment=F), damping).decompose(other, S)
    torch.testing.assert_close(found.energies, expected.energies, rtol=1e-7, atol=1e-10)
    for rank in range(1, n + 1):
        first, second = (B @ A for A, B in (each.factors(rank) for each in (found, expected)))
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_input_of_a_singular_weight(generator):
    W, S, F = random(generator, 9, 6), moment(generator, 6), moment(generator, 9)
    W[:, 5] = W[:, 0] - W[:, 1]
    found = OutputFisher.of(
        W, LayerStatistics(10, input_gradient_moment=W.T @ F @ W, gradient_energy=F.trace()), 0.03
    ).decompose(W, S)
    expected = OutputFisher.of(W, LayerStatistics(10, gradient_moment=F), 0.03).decompose(W, S)
    for rank in range(1, 6):
        first, second = (B @ A for A, B in (each.factors(rank) for each in (found, expected)))
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_a_layer_without_gradients_loses_nothing_and_has_factors(generator, shape):
    m, n = shape
    W, S = random(generator, m, n), moment(generator, n)
    statistics = LayerStatistics(
        10,
        input_covariance=S,
        output_covariance=W @ S @ W.T,
        gradient_moment=torch.zeros(m, m).double() if m < n else None,
        input_gradient_moment=torch.zeros(n, n).double(),
        gradient_energy=torch.zeros(()).double(),
    )
    found = METRICS.create("kfac").decompose(W, statistics)
    assert torch.equal(found.energies, torch.zeros(6).double())
    A, B = found.factors(6)
    torch.testing.assert_close(B @ A, W)


def test_rounding_may_leave_the_moment_of_gradients_indefinite(generator):
    W, S, F = random(generator, 6, 6), moment(generator, 6), torch.diag(torch.tensor([1, 1, 1, 1, 1, -1e-9]).double())
    for indefinite in (F, -F, 1e-60 * F):
        A, B = decompose_two_sided(W, indefinite, S).factors(6)
        torch.testing.assert_close(B @ A, W)


def test_damping():
    torch.testing.assert_close(damped(torch.diag(torch.tensor([1.0, 3.0])), 0.5), torch.diag(torch.tensor([2.0, 4.0])))
    assert torch.equal(damped(torch.zeros(3, 3), 0.1), torch.eye(3))


def test_energies_of_the_metric_are_half_the_loss_of_all_tokens(generator):
    W, F, S = random(generator, 6, 6), moment(generator, 6), moment(generator, 6)
    statistics = LayerStatistics(
        num_tokens=50, num_images=10, input_mean=torch.zeros(6).double(), input_covariance=S, gradient_moment=F
    )
    metric = METRICS.create("kfac")
    metric.damping = 0.0
    total = metric.decompose(W, statistics).tails()[0]
    torch.testing.assert_close(total, 5 / 2 * loss(F, S, W), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_anchored_weight_minimises_its_objective(generator, shape):
    m, n = shape
    W, X, T = random(generator, m, n), random(generator, n, 50), random(generator, m, 50)
    S, St, ridge = X @ X.T / 50, T @ X.T / 50, 0.1
    penalty = ridge * S.diagonal().mean()

    def objective(weight):
        return (T - weight @ X).square().sum() / 50 + penalty * (weight - W).square().sum()

    best = anchored_weight(W, S, St, ridge)
    for scale in (1e-4, 1e-2, 1):
        assert objective(best + scale * random(generator, m, n)) > objective(best)


def test_anchored_weight_keeps_the_original_where_nothing_changed(generator):
    W, S = random(generator, 5, 7), moment(generator, 7)
    torch.testing.assert_close(anchored_weight(W, S, W @ S, 0.1), W, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(anchored_weight(W, S, random(generator, 5, 7), 1e9), W, rtol=1e-5, atol=1e-5)


def test_constant_inputs_leave_the_weight_alone():
    zeros = torch.zeros(2, 2).double()
    assert torch.equal(anchored_weight(torch.eye(2).double(), zeros, zeros, 0.1), torch.eye(2).double())


def test_inputs_that_vary_less_than_float32_can_tell_leave_the_weight_alone(generator):
    W, S, cross = random(generator, 4, 4), moment(generator, 4), random(generator, 4, 4)
    assert not torch.allclose(anchored_weight(W, S, cross, 0.03), W, atol=0.1)
    assert torch.equal(anchored_weight(W, 1e-44 * S, 1e-44 * cross, 0.03), W)


def test_a_moment_that_rounding_has_made_indefinite_changes_nothing_elsewhere(generator):
    W, ridge = random(generator, 5, 6), 0.03
    vectors, _ = torch.linalg.qr(random(generator, 6, 6))
    values = torch.tensor([0.0, 0.5, 1.0, 1.0, 1.5, 2.0], dtype=torch.float64)
    exact, rounded = ((vectors * each) @ vectors.T for each in (values, values.index_fill(0, torch.tensor(0), -0.2)))
    found, expected = (anchored_weight(W, S, W @ exact + 0.1, ridge) for S in (rounded, exact))
    torch.testing.assert_close(found @ vectors[:, 1:], expected @ vectors[:, 1:], rtol=0.05, atol=0.05)
    assert (found - expected).norm() < 0.3 * expected.norm()
