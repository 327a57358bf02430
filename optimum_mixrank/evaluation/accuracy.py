"""Top-k accuracy as a metric of the `evaluate` library, shipped so that nothing has to be downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import torch

from .top_k import top_k_correct


_DESCRIPTION = "The share of images whose label is among the k classes with the highest scores."

_INPUTS = """
Args:
    predictions: per image, the logits of all classes; with `config_name="rankings"` class indices, best first.
    references: per image, the index of its class.
    k: one or several numbers of classes, default (1, 5); more than there are classes are as many as there are.

Returns:
    a dictionary with `top1`, `top5`, … in [0, 1].
"""


class TopKAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy, from logits or from ranked labels.

    Nothing is written to the user's cache: predictions stay in memory (4 bytes per image and class). Give
    `keep_in_memory=False` to put them into temporary files, or `cache_dir` to say where.

    Args:
        config_name: `"logits"` (default) or `"rankings"`.
        keep_in_memory: Whether predictions stay in memory; default: yes, unless several processes work together.
        cache_dir: Folder for temporary files; default: a temporary folder that goes with this object. Several
            processes need one that all of them see.
        num_process: Processes that evaluate together.
        **kwargs: As for `evaluate.Metric`.

    Raises:
        ValueError: for an unknown `config_name`, or several processes without `cache_dir`.

    Example:
        ```python
        metric = TopKAccuracy()
        metric.add_batch(predictions=logits, references=labels)
        metric.compute()  # {"top1": 0.812, "top5": 0.954}
        ```
    """

    def __init__(
        self,
        config_name: str | None = None,
        keep_in_memory: bool | None = None,
        cache_dir: str | None = None,
        num_process: int = 1,
        **kwargs: Any,
    ) -> None:
        config_name = "logits" if config_name in (None, "default") else config_name
        if config_name not in ("logits", "rankings"):
            raise ValueError(f"config_name={config_name!r} is unknown; choose 'logits' or 'rankings'.")
        if cache_dir is None:
            if num_process > 1:
                raise ValueError(
                    f"num_process={num_process} needs `cache_dir`, a folder that all processes see and may write to."
                )
            # `evaluate.Metric` makes a folder even if it keeps everything in memory, and by default below the home.
            self._temporary = tempfile.TemporaryDirectory(prefix="mixrank-metric-")
            cache_dir = self._temporary.name
        super().__init__(
            config_name=config_name,
            keep_in_memory=num_process == 1 if keep_in_memory is None else keep_in_memory,
            cache_dir=cache_dir,
            num_process=num_process,
            **kwargs,
        )

    def _info(self) -> evaluate.MetricInfo:
        element = "float32" if self.config_name == "logits" else "int64"
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value(element)), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any, k: int | Iterable[int] = (1, 5)) -> dict[str, float]:
        lengths = {len(row) for row in predictions}
        if len(lengths) != 1:
            raise ValueError(
                f"predictions have rows of {sorted(lengths)} values; give one row per image, of one length."
            )
        labels = torch.tensor(list(references))
        scores = torch.tensor(list(predictions))
        result = {}
        for number in [k] if isinstance(k, int) else k:
            if self.config_name == "logits":
                correct = top_k_correct(scores, labels, number)
            else:
                correct = _in_first(scores, labels, number)
            result[f"top{number}"] = correct.double().mean().item()
        return result


def _in_first(rankings: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    if k < 1:
        raise ValueError(f"k={k} is not positive; top-1 and top-5 are usual.")
    return (rankings[:, :k] == labels.unsqueeze(1)).any(dim=1)
