import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import optimum_mixrank
from optimum_mixrank.evaluation.accuracy import TopKAccuracy


LOGITS = [[0.1, 0.9, 0.0, 0, 0, 0, 0], [0.5, 0.2, 0.3, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1, 0]]


def test_top1_and_top5_from_logits():
    result = TopKAccuracy().compute(predictions=LOGITS, references=[1, 2, 6])
    assert result == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


def test_other_k():
    metric = TopKAccuracy()
    assert metric.compute(predictions=LOGITS, references=[1, 2, 6], k=2) == {"top2": pytest.approx(2 / 3)}


@pytest.mark.parametrize("convert", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_batches(convert):
    metric = TopKAccuracy()
    metric.add_batch(predictions=convert(LOGITS[:2]), references=convert([1, 2]))
    metric.add_batch(predictions=convert(LOGITS[2:]), references=convert([6]))
    assert metric.compute() == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


def test_rankings():
    metric = TopKAccuracy("rankings")
    result = metric.compute(predictions=[[3, 1], [0, 2], [5, 6]], references=[3, 2, 4])
    assert result == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


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


def test_home_that_cannot_be_written(tmp_path):
    # A file in the place of the home: nobody, not even root, can make a folder below it.
    home = tmp_path / "home"
    home.touch()
    names = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE")
    environment = {**os.environ, **dict.fromkeys(names, str(home / "below"))}
    environment["PYTHONPATH"] = str(Path(optimum_mixrank.__file__).parents[1])
    code = (
        "from optimum_mixrank.evaluation.accuracy import TopKAccuracy\n"
        "print(TopKAccuracy().compute(predictions=[[0.0, 1.0]], references=[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "{'top1': 1.0, 'top5': 1.0}"
