"""Whether the same objects are found."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.model_output import ModelOutput
from .measure import MEASURES, PairMeasure


MIN_SCORE = 0.5
"""What a detection has to score in the original to count; the best one of an image counts in any case."""

MIN_IOU = 0.5
"""How much two boxes have to overlap to be the same."""


@MEASURES.register
class MatchedBoxes(PairMeasure):
    """Share of the original's boxes that the compressed model finds too, with the same class and an IoU of at least 0.5.

    Of an image, the detections of the original that score at least 0.5 are compared with as many of the compressed model's
    best, at least one. They are matched greedily, those with the highest score first, and each box is used once.
    """

    name = "matched_boxes"
    label = "boxes found by both"
    kinds = ("detection",)
    form = ".2%"
    good, usable = 0.95, 0.85

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`."""
        pairs = zip(_detections(original), _detections(output), strict=True)
        return torch.tensor([_matched(*pair) for pair in pairs], dtype=torch.float64)


_Detections = tuple[Tensor, Tensor, Tensor]
"""Scores and classes, `[boxes]`, and corners of boxes, `[boxes, 4]`, the highest score first."""


def _detections(output: ModelOutput) -> list[_Detections]:
    """Return what each image shows."""
    logits, boxes = output.distributions[0].double(), output.features[0].double()
    probabilities = logits.softmax(dim=-1)
    # With one softmax the last class is that there is nothing; otherwise each class has a yes and a no.
    by_class = probabilities[..., :-1] if logits.ndim == 3 else probabilities[..., 0]
    scores, classes = by_class.max(dim=-1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    found = zip(scores, classes, _corners(boxes), order, strict=True)
    return [(score[by], each[by], box[by]) for score, each, box, by in found]


def _corners(boxes: Tensor) -> Tensor:
    """Return the lower and the upper corner of boxes, `[..., 4]`, of quadrangles those of the box around them.

    Args:
        boxes: Their centres and sizes, `[..., 4]`; of a quadrangle the centre, followed by the offsets of the four corners
            from it, which are stored with a half added to each, `[..., 10]`.
    """
    centre, rest = boxes[..., :2], boxes[..., 2:]
    if rest.shape[-1] == 2:
        return torch.cat([centre - rest / 2, centre + rest / 2], dim=-1)
    points = centre[..., None, :] + rest.unflatten(-1, (-1, 2)) - 0.5
    return torch.cat([points.amin(dim=-2), points.amax(dim=-2)], dim=-1)


def _matched(original: _Detections, compressed: _Detections) -> float:
    count = max(1, int((original[0] >= MIN_SCORE).sum()))
    _, classes, boxes = (each[:count] for each in original)
    _, other_classes, other_boxes = (each[:count] for each in compressed)
    iou = _box_iou(boxes, other_boxes)
    iou[classes[:, None] != other_classes] = 0
    matched = 0
    for row in iou:
        best = int(row.argmax())
        if row[best] >= MIN_IOU:
            matched += 1
            iou[:, best] = 0
    return matched / count


def _box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of boxes given by corners, `[len(a), len(b)]`."""
    lower, upper = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    both = (upper - lower).clamp_min(0).prod(dim=-1)
    areas = [(each[:, 2:] - each[:, :2]).clamp_min(0).prod(dim=-1) for each in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both).clamp_min(1e-12)
