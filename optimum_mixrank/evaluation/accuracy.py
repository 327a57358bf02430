"""Top-k accuracy as a metric of the `evaluate` library, shipped with the package so that nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor


_INPUTS = """
Args:
    predictions: for each image, the logits of all classes; with `config_name="rankings"` class indices, best first.
    references: for each image, the index of its class.
    k: one or several numbers of classes, default (1, 5); `k` may exceed the number of classes.
    normalize: whether to return shares of the images, the default, or their numbers.

Returns:
    a dictionary with `top1`, `top5`, …: the share, in [0, 1], or the number of correctly classified images.
"""


class TopKAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy, from logits or from ranked classes.

    Nothing is written to the user's cache: predictions stay in memory, 4 bytes per image and class (8 for rankings),
    unless `keep_in_memory=False` puts them into temporary files.

    Args:
        config_name: `"logits"` (default) or `"rankings"`.
        num_process: Number of processes that evaluate together through `cache_dir`.
        cache_dir: Folder for temporary files, visible to all processes; default: a temporary folder that is removed
            together with this object.
        **kwargs: As for `evaluate.Metric`; `keep_in_memory` is True by default if `num_process` is 1.

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
        self, config_name: str | None = None, *, num_process: int = 1, cache_dir: str | None = None, **kwargs: Any
    ) -> None:
        config_name = "logits" if config_name in (None, "default") else config_name
        if config_name not in ("logits", "rankings"):
            raise ValueError(f"config_name={config_name!r} is unknown; choose 'logits' or 'rankings'.")
        if cache_dir is None:
            if num_process > 1:
                raise ValueError(f"num_process={num_process} needs `cache_dir`, a folder shared by all processes.")
            # `evaluate.Metric` creates a folder even if it keeps everything in memory, by default below the home.
            self._temporary = tempfile.TemporaryDirectory(prefix="mixrank-metric-")
            cache_dir = self._temporary.name
        if kwargs.get("keep_in_memory") is None:
            kwargs["keep_in_memory"] = num_process == 1
        super().__init__(config_name=config_name, num_process=num_process, cache_dir=cache_dir, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        element = datasets.Value("float32" if self.config_name == "logits" else "int64")
        features = {"predictions": datasets.Sequence(element), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="The share of images whose label is among the k classes with the highest scores.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: Any, references: Any, k: int | Iterable[int] = (1, 5), normalize: bool = True
    ) -> dict[str, float]:
        numbers = [k] if isinstance(k, int) else list(k)
        if min(numbers) < 1:
            raise ValueError(f"k={min(numbers)} is not positive; top-1 and top-5 are usual.")
        rows = list(predictions)
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"predictions have rows of {sorted(lengths)} values; give rows of equal length.")
        labels, rankings = torch.tensor(list(references)), torch.tensor(rows)
        if self.config_name == "logits":
            rankings = rank_classes(rankings, labels, max(numbers))
        hits = rankings == labels.unsqueeze(1)
        correct = {f"top{number}": hits[:, :number].any(dim=1).sum().item() for number in numbers}
        return {name: count / len(labels) for name, count in correct.items()} if normalize else correct


def rank_classes(logits: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Return the `k` classes with the highest logits, best first, `[images, min(k, classes)]`.

    Of classes with equal logits the one with the lower index comes first, so that ties, which are common in half
    precision, are broken in the same way on every device.

    Args:
        logits: `[images, classes]`.
        labels: `[images]`, class indices; they are only checked.
        k: Number of classes to return.

    Raises:
        ValueError: if shapes or labels do not fit, or the logits contain NaN.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not fit; give "
            "[images, classes] and [images]."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of dtype {labels.dtype} are not class indices; give integers.")
    if torch.isnan(logits).any():
        raise ValueError(
            "The logits contain NaN; a half-precision model may have overflowed, load it with dtype='float32'."
        )
    num_classes = logits.shape[1]
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"Label {int(wrong[0])} is outside [0, {num_classes}), the classes of the model; map the labels of the "
            "dataset to those of the model."
        )
    # NumPy, whose stable sort is several times as fast on the CPU as PyTorch's.
    order = np.argsort(-logits.double().cpu().numpy(), axis=1, kind="stable")
    return torch.from_numpy(order[:, :k].copy())
