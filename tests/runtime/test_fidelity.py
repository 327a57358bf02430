import pytest
import torch

from optimum_mixrank.runtime.fidelity import agreement, kl_divergence, mean_relative_error, relative_error


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 9, generator=generator) * 3, torch.randn(6, 9, generator=generator) * 3


def test_kl_against_the_definition(pair):
    p, q = (logits.double().softmax(1) for logits in pair)
    torch.testing.assert_close(kl_divergence(*pair), (p * (p / q).log()).sum(1), rtol=1e-10, atol=0)


def test_kl_is_not_symmetric_and_the_original_comes_first():
    # log(1/2) against the class that the compressed model is sure not to be: 0.5 * 20 nats, less what is sure.
    certain, undecided = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(undecided, certain).item() == pytest.approx(
        10 - torch.log(torch.tensor(2.0)).item(), abs=1e-6
    )
    assert kl_divergence(certain, undecided).item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)


def test_kl_of_a_model_with_itself_is_zero(pair):
    assert torch.equal(kl_divergence(pair[0], pair[0]), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-5, 1e4], ids=["tiny-difference", "huge-logits"])
def test_kl_is_finite_and_resolved(scale):
    logits = torch.tensor([[1.0, 2.0, 3.0]]) * max(scale, 1)
    value = kl_divergence(logits, logits + torch.tensor([[scale, 0.0, 0.0]])).item()
    p = torch.softmax(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 0)[0].item()
    # To second order KL is half the variance of the change of the logits.
    expected = 0.5 * p * (1 - p) * scale**2 if scale < 1 else 0.0
    assert value == pytest.approx(expected, rel=0.02, abs=1e-15)


def test_kl_ignores_a_constant(pair):
    torch.testing.assert_close(kl_divergence(pair[0], pair[1] + 5), kl_divergence(*pair), rtol=1e-5, atol=1e-6)


def test_agreement():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert agreement(logits, logits.flip(1)).tolist() == [False, False, False]
    assert agreement(logits, 2 * logits).tolist() == [True, True, True]


def test_relative_error_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    reference, features = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)
    for index, value in enumerate(relative_error(reference, features)):
        f, g = reference[index].double(), features[index].double()
        assert value.item() == pytest.approx((f - g).norm().item() ** 2 / f.norm().item() ** 2, rel=1e-12)


def test_relative_error_of_zeros():
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    assert relative_error(zeros, zeros).item() == 0
    assert relative_error(zeros, ones).item() == float("inf")
    assert relative_error(ones, zeros).item() == 1


@pytest.mark.parametrize("function", [kl_divergence, agreement], ids=lambda function: function.__name__)
def test_logits_of_another_head(function):
    with pytest.raises(ValueError, match=r"Logits of shape \(2, 3\) cannot be compared with the original's, \(2, 4\)"):
        function(torch.zeros(2, 4), torch.zeros(2, 3))


def test_features_of_another_shape():
    with pytest.raises(ValueError, match=r"Features of shape \(2, 3\) cannot be compared.*\(2, 4\)"):
        relative_error(torch.zeros(2, 4), torch.zeros(2, 3))


def test_features_that_are_zero_are_passed_over():
    zeros, ones = torch.zeros(2, 4), torch.ones(2, 4)
    assert mean_relative_error([ones, zeros], [0.5 * ones, ones]).tolist() == [0.25, 0.25]
    assert mean_relative_error([ones, zeros], [0.5 * ones, zeros]).tolist() == [0.125, 0.125]
    assert mean_relative_error([zeros], [ones]).tolist() == [float("inf")] * 2
