"""Balancing, bias correction and what a `Decomposition` promises, whichever metric made it."""

import pytest
import torch

from optimum_mixrank.decomposition import Decomposition, balance, corrected_bias
from optimum_mixrank.decomposition.factorization import decompose_by_input, decompose_by_output, root_of_covariance


SHAPES = [(13, 13), (21, 10), (10, 21), (1, 7), (7, 1), (1, 1)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def squared(matrix):
    return matrix.square().sum().item()


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def problem(request, generator):
    """A weight and a root of its inputs' covariance, with very uneven directions."""
    m, n = request.param
    root = random(generator, n, n) * torch.logspace(0, -3, n, dtype=torch.float64)
    return random(generator, m, n), root


@pytest.fixture(params=["input", "output"])
def decomposed(request, problem):
    weight, root = problem
    if request.param == "input":
        return decompose_by_input(weight, root)
    return decompose_by_output(weight, weight @ root @ root.T @ weight.T)


def test_error_of_every_rank_is_the_tail_energy(problem, decomposed):
    weight, root = problem
    for rank in range(len(decomposed.energies) + 1):
        error = squared((weight - decomposed.left[:, :rank] @ decomposed.right[:rank]) @ root)
        assert error == pytest.approx(
            decomposed.energies[rank:].sum().item(), rel=1e-6, abs=1e-12 * squared(weight @ root)
        )


def test_energies_are_the_squared_singular_values_seen_through_the_inputs(problem, decomposed):
    weight, root = problem
    expected = torch.linalg.svdvals(weight @ root).square()
    torch.testing.assert_close(decomposed.energies, expected, rtol=1e-6, atol=1e-12 * expected[0].item())


def test_truncation_is_the_truncated_svd_seen_through_the_inputs(problem, decomposed):
    weight, root = problem
    U, S, Vh = torch.linalg.svd(weight @ root, full_matrices=False)
    for rank in range(1, len(S) + 1):
        found = decomposed.left[:, :rank] @ decomposed.right[:rank] @ root
        torch.testing.assert_close(found, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-5, atol=1e-5 * S[0].item())


def test_full_rank_reproduces_the_weight(problem, decomposed):
    weight, _ = problem
    # Eigenvectors are as exact as their eigenvalue is far from zero: here 1e-6 of the largest.
    torch.testing.assert_close(decomposed.left @ decomposed.right, weight, rtol=0, atol=1e-8)


def test_left_is_orthonormal(decomposed):
    gram = decomposed.left.T @ decomposed.left
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-10)


def test_losses_fall_from_one_to_zero(decomposed):
    losses = decomposed.losses()
    assert len(losses) == len(decomposed.energies) + 1
    assert losses[0].item() == pytest.approx(1)
    assert losses[-1] == 0
    assert (losses[1:] <= losses[:-1]).all()


def test_no_perturbation_of_the_factors_is_better(generator):
    weight, root = random(generator, 8, 6), random(generator, 6, 6)
    decomposed = decompose_by_input(weight, root)
    for rank in (1, 3, 5):
        A, B = decomposed.factors(rank)
        best = squared((weight - B @ A) @ root)
        for scale in (1e-4, 1e-2, 1.0):
            for _ in range(20):
                other = (B + scale * random(generator, *B.shape)) @ (A + scale * random(generator, *A.shape))
                assert squared((weight - other) @ root) >= best * (1 - 1e-12)


def test_directions_that_the_inputs_never_reach_follow_the_svd_of_the_weight(generator):
    # Inputs reach the first three of nine features only; the others see the weight's own best approximation.
    weight = random(generator, 12, 9)
    root = torch.zeros(9, 3, dtype=torch.float64)
    root[:3] = random(generator, 3, 3)
    decomposed = decompose_by_input(weight, root)
    assert decomposed.energies.shape == (9,)
    assert (decomposed.energies[3:] == 0).all()
    seen = decomposed.left[:, :3] @ decomposed.right[:3]
    torch.testing.assert_close(seen @ root, weight @ root)
    rest = torch.linalg.svdvals(weight - seen)
    for rank in range(3, 9):
        error = squared(weight - decomposed.left[:, :rank] @ decomposed.right[:rank])
        assert error == pytest.approx(rest[rank - 3 :].square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("columns", [0, 1, 4], ids=lambda columns: f"rank {columns}")
def test_singular_covariance_gives_all_components(generator, columns):
    weight, root = random(generator, 11, 6), random(generator, 6, columns)
    covariance = root @ root.T
    assert root_of_covariance(covariance).shape == (6, columns)
    by_input = decompose_by_input(weight, root_of_covariance(covariance))
    by_output = decompose_by_output(weight, weight @ covariance @ weight.T)
    for decomposed in (by_input, by_output):
        assert decomposed.left.shape == (11, 6) and decomposed.right.shape == (6, 6)
        torch.testing.assert_close(decomposed.left @ decomposed.right, weight)
        assert (decomposed.energies[columns:] == 0).all()


def test_root_of_covariance_is_a_root(generator):
    root = random(generator, 9, 4)
    found = root_of_covariance(root @ root.T)
    torch.testing.assert_close(found @ found.T, root @ root.T)


def test_root_of_a_slightly_negative_covariance_is_finite():
    # Rounding may leave a covariance with eigenvalues just below zero.
    root = root_of_covariance(torch.diag(torch.tensor([1.0, -1e-17, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(root @ root.T, torch.diag(torch.tensor([1.0, 0, 0], dtype=torch.float64)))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=["wide", "tall"])
def test_zero_weight(shape):
    weight = torch.zeros(shape, dtype=torch.float64)
    decomposed = decompose_by_input(weight, torch.eye(shape[1], dtype=torch.float64))
    assert (decomposed.losses() == 0).all()
    assert (decomposed.left @ decomposed.right == 0).all()
    A, B = decomposed.factors(2)
    assert A.shape == (2, shape[1]) and B.shape == (shape[0], 2)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert (B @ A == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_truncated_keeps_components_and_all_energies(generator, dtype):
    decomposed = decompose_by_input(random(generator, 8, 6), random(generator, 6, 6))
    kept = decomposed.truncated(4, dtype)
    assert kept.left.shape == (8, 4) and kept.right.shape == (4, 6)
    assert kept.left.dtype == kept.right.dtype == dtype
    assert kept.left.is_contiguous() and kept.right.is_contiguous()
    assert torch.equal(kept.losses(), decomposed.losses())
    torch.testing.assert_close(kept.left.double(), decomposed.left[:, :4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_are_balanced_float64(generator, rank):
    decomposed = decompose_by_input(random(generator, 10, 6), random(generator, 6, 6)).truncated(rank, torch.float32)
    A, B = decomposed.factors(rank)
    assert A.dtype == B.dtype == torch.float64
    assert_balanced(A, B, decomposed.left.double() @ decomposed.right.double())


def assert_balanced(A, B, product):
    torch.testing.assert_close(B @ A, product)
    torch.testing.assert_close(A @ A.T, B.T @ B)
    singular_values = torch.linalg.svdvals(product)[: len(A)]
    torch.testing.assert_close(A @ A.T, torch.diag(singular_values))


@pytest.mark.parametrize("shape", [(7, 12, 4), (12, 7, 7), (1, 9, 1), (9, 1, 1)], ids=str)
def test_balance(generator, shape):
    m, n, rank = shape
    A, B = 1e3 * random(generator, rank, n), 1e-3 * random(generator, m, rank)
    assert_balanced(*balance(A, B), B @ A)


def test_balance_of_a_rank_deficient_product(generator):
    A, B = random(generator, 4, 9), random(generator, 6, 4)
    A[3] = A[2]
    B[:, 1] = 0
    balanced = balance(A, B)
    assert_balanced(*balanced, B @ A)
    assert all(torch.isfinite(factor).all() for factor in balanced)
    assert squared(balanced[0][2:]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_corrected_bias_keeps_the_mean_output(generator, dtype):
    inputs = random(generator, 50, 6) + 10
    weight = random(generator, 9, 6)
    bias = random(generator, 9)
    A, B = (factor.to(dtype) for factor in decompose_by_input(weight, inputs.T).factors(3))
    corrected = corrected_bias(weight, bias, B.double() @ A.double(), inputs.mean(0))
    assert corrected.dtype == torch.float64
    before = torch.nn.functional.linear(inputs, weight, bias)
    after = torch.nn.functional.linear(inputs, B.double() @ A.double(), corrected)
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-12, atol=1e-12)


def test_corrected_bias_absorbs_the_rounding_of_float16_factors(generator):
    inputs = random(generator, 50, 6) + 10
    weight, bias = random(generator, 9, 6), random(generator, 9)
    A, B = decompose_by_input(weight, inputs.T).factors(3)
    exact = corrected_bias(weight, bias, B @ A, inputs.mean(0))
    rounded = corrected_bias(weight, bias, B.half().double() @ A.half().double(), inputs.mean(0))
    change = (B @ A - B.half().double() @ A.half().double()) @ inputs.mean(0)
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(rounded - exact, change, rtol=1e-9, atol=1e-12)


def test_losses_without_energy_are_zero():
    nothing = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(
        Decomposition(torch.eye(3), torch.eye(3), nothing).losses(), torch.zeros(4, dtype=torch.float64)
    )
