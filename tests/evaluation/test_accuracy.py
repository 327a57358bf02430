"""Top-k accuracy: the metric of the `evaluate` library, and the ranking of classes that it is computed from."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import optimum_mixrank
from optimum_mixrank.evaluation.accuracy import TopKAccuracy, rank_classes


LOGITS = [[0.1, 0.9, 0.0, 0, 0, 0, 0], [0.5, 0.2, 0.3, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1, 0]]


def test_top1_and_top5_from_logits():
    result = TopKAccuracy().compute(predictions=LOGITS, references=[1, 2, 6])
    assert result == {"top1": 1 / 3, "top5": 2 / 3}


def test_number_of_correct_images():
    result = TopKAccuracy().compute(predictions=LOGITS, references=[1, 2, 6], normalize=False)
    assert result == {"top1": 1, "top5": 2}


def test_other_k():
    metric = TopKAccuracy()
    assert metric.compute(predictions=LOGITS, references=[1, 2, 6], k=2) == {"top2": 2 / 3}
    assert metric.compute(predictions=LOGITS, references=[1, 2, 6], k=[1, 7]) == {"top1": 1 / 3, "top7": 1.0}


@pytest.mark.parametrize("convert", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_batches(convert):
    metric = TopKAccuracy()
    metric.add_batch(predictions=convert(LOGITS[:2]), references=convert([1, 2]))
    metric.add_batch(predictions=convert(LOGITS[2:]), references=convert([6]))
    assert metric.compute() == {"top1": 1 / 3, "top5": 2 / 3}


def test_rankings():
    metric = TopKAccuracy("rankings")
    result = metric.compute(predictions=[[3, 1], [0, 2], [5, 6]], references=[3, 2, 4])
    assert result == {"top1": 1 / 3, "top5": 2 / 3}


def test_fewer_classes_than_k():
    assert TopKAccuracy().compute(predictions=[[0.1, 0.9]], references=[0]) == {"top1": 0.0, "top5": 1.0}


def test_files_on_request(tmp_path):
    metric = TopKAccuracy(keep_in_memory=False, cache_dir=str(tmp_path))
    assert metric.compute(predictions=LOGITS, references=[1, 0, 0])["top1"] == 1.0


def test_unknown_kind():
    with pytest.raises(ValueError, match="config_name='labels' is unknown; choose 'logits' or 'rankings'"):
        TopKAccuracy("labels")


def test_several_processes_need_a_common_folder():
    with pytest.raises(ValueError, match="num_process=2 needs `cache_dir`"):
        TopKAccuracy(num_process=2)


def test_rows_of_different_length():
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] values"):
        TopKAccuracy().compute(predictions=[[1.0], [1.0, 2.0]], references=[0, 0])


def test_k_is_positive():
    with pytest.raises(ValueError, match="k=0 is not positive"):
        TopKAccuracy("rankings").compute(predictions=[[0]], references=[0], k=0)


def test_unusable_labels_are_noticed():
    with pytest.raises(ValueError, match=r"Label 7 is outside \[0, 7\)"):
        TopKAccuracy().compute(predictions=LOGITS, references=[0, 1, 7])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ranking_against_the_definition(dtype):
    # A class is before the right one if its score is higher, or equal with a lower index. In bfloat16 many are equal.
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(1))
    own = logits.gather(1, labels[:, None])
    before = (logits > own) | ((logits == own) & (torch.arange(300) < labels[:, None]))
    for k in (1, 5, 100, 300):
        ranking = rank_classes(logits, labels, k)
        assert ranking.shape == (50, k)
        assert torch.equal((ranking == labels[:, None]).any(1), before.sum(1) < k)


def test_ties_go_to_the_lower_index():
    assert rank_classes(torch.zeros(2, 7), torch.tensor([0, 6])).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert rank_classes(torch.tensor([[0.0, -0.0, 1.0, 1.0]]), torch.tensor([0])).tolist() == [[2, 3, 0, 1]]


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"Label 3 is outside \[0, 3\).*map the labels"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), r"Label -1 is outside \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0]), r"shape \(2, 3\) and labels of shape \(1,\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "dtype torch.float32 are not class indices"),
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), "contain NaN"),
    ],
    ids=["too-large", "negative", "lengths", "float", "nan"],
)
def test_unusable_input(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        rank_classes(logits, labels)


def test_home_that_cannot_be_written(tmp_path):
    # A file in the place of the home: nobody, not even root, can make a folder below it.
    home = tmp_path / "home"
    home.touch()
    names = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE")
    environment = {**os.environ, **dict.fromkeys(names, str(home / "below"))}
    environment["PYTHONPATH"] = str(Path(optimum_mixrank.__file__).parents[1])
    code = (
        "import sys\n"
        "from collections import namedtuple\n"
        "import torch\n"
        "from torch import nn\n"
        "from optimum_mixrank.evaluation.evaluate import evaluate_model\n"
        "assert 'evaluate' not in sys.modules\n"
        "class Model(nn.Module):\n"
        "    def forward(self, pixel_values):\n"
        "        return {'logits': pixel_values}\n"
        "Batch = namedtuple('Batch', ['pixel_values', 'labels'])\n"
        "evaluate_model(Model(), [Batch(torch.eye(3), None)], Model())\n"
        "assert 'evaluate' not in sys.modules\n"
        "print(evaluate_model(Model(), [Batch(torch.eye(3), torch.tensor([0, 1, 0]))]).top1 == 2 / 3)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"
