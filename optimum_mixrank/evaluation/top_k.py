"""Whether the right class is among the first k, as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of the right class in the order of falling scores; 0 is the first.

    Of classes with the same score the one with the lower index comes first, so that ties, which are common in half
    precision, are broken the same way on every device.

    Args:
        scores: `[images, classes]`, logits or probabilities.
        labels: `[images]`, integers in `[0, classes)`.

    Returns:
        `[images]`, int64.

    Raises:
        ValueError: if shapes or labels do not fit, or scores hold NaN.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"Scores of shape {tuple(scores.shape)} and labels of shape {tuple(labels.shape)} do not fit; give "
            "[images, classes] and [images]."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of dtype {labels.dtype} are no class indices; give integers.")
    if torch.isnan(scores).any():
        raise ValueError(
            "The scores hold NaN; a half-precision model may have overflowed, load it with dtype='float32'."
        )
    num_classes = scores.shape[1]
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"Label {int(wrong[0])} is outside [0, {num_classes}), the classes of the model; map the labels of the "
            "dataset to those of the model."
        )
    columns = labels.to(scores.device, torch.long).unsqueeze(1)
    own = scores.gather(1, columns)
    before = torch.arange(num_classes, device=scores.device) < columns
    return ((scores > own) | ((scores == own) & before)).sum(dim=1)


def top_k_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the right class is among the `k` classes with the highest scores; `k` may exceed their number.

    Args:
        scores: `[images, classes]`.
        labels: `[images]`.
        k: At least 1.

    Returns:
        `[images]`, bool.

    Raises:
        ValueError: if `k` is not positive, and as `label_ranks`.
    """
    if k < 1:
        raise ValueError(f"k={k} is not positive; top-1 and top-5 are usual.")
    return label_ranks(scores, labels) < k
