import pytest
import torch

from optimum_mixrank.evaluation.top_k import label_ranks, top_k_correct


def test_against_sorting():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(1))
    order = scores.argsort(dim=1, descending=True)
    for k in (1, 3, 5, 7):
        assert torch.equal(top_k_correct(scores, labels, k), (order[:, :k] == labels[:, None]).any(1))


def test_ties_go_to_the_lower_index():
    assert label_ranks(torch.zeros(3, 4), torch.tensor([0, 1, 3])).tolist() == [0, 1, 3]


def test_k_may_exceed_the_number_of_classes():
    assert top_k_correct(torch.zeros(2, 3), torch.tensor([0, 2]), 5).all()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"Label 3 is outside \[0, 3\).*map the labels"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), r"Label -1 is outside \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0]), r"shape \(2, 3\) and labels of shape \(1,\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "dtype torch.float32 are no class indices"),
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), "hold NaN"),
    ],
    ids=["too-large", "negative", "lengths", "float", "nan"],
)
def test_unusable_input(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        top_k_correct(scores, labels, 1)


def test_k_is_positive():
    with pytest.raises(ValueError, match="k=0 is not positive"):
        top_k_correct(torch.zeros(1, 2), torch.tensor([0]), 0)
