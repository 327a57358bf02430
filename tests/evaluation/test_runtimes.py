"""Modules run by PyTorch, compiled, and by ONNX Runtime."""

import pytest
import torch
from torch import nn

from optimum_mixrank.evaluation.runtimes import check_runtime, runnable


class Doubled(nn.Module):
    def forward(self, input):
        return (2 * input,)


def test_eager():
    (found,) = runnable(Doubled(), torch.ones(3), "eager")()
    assert found.tolist() == [2, 2, 2]


@pytest.mark.slow
def test_many_modules_of_one_class_are_compiled():
    for size in range(1, 12):
        (found,) = runnable(Doubled(), torch.ones(size), "compile")()
        assert found.tolist() == [2] * size


def test_onnxruntime():
    pytest.importorskip("onnxruntime")
    function = runnable(nn.Linear(3, 2).eval(), torch.ones(4, 3), "onnxruntime")
    with torch.no_grad():
        function()


def test_refusals(monkeypatch):
    check_runtime("eager", torch.device("cuda"))
    with pytest.raises(ValueError, match="runtime='fast' is unknown"):
        check_runtime("fast", torch.device("cpu"))
    with pytest.raises(ValueError, match="is measured on the CPU, but the model is on 'cuda'"):
        check_runtime("onnxruntime", torch.device("cuda"))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="needs onnx"):
        check_runtime("onnxruntime", torch.device("cpu"))
