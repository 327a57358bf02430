"""Whether masks cover the same pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.model_output import ModelOutput
from .measure import MEASURES, PairMeasure


@MEASURES.register
class MaskIou(PairMeasure):
    """Intersection over union of the masks of both models; 1 for equal ones.

    Where each pixel has one class, masks are the areas of classes, and the mean is over those that either model sees in
    the image. Other masks are compared one by one; two empty ones are equal.
    """

    name = "mask_iou"
    label = "IoU of masks"
    kinds = ("segmentation", "segments", "masks")
    form = ".4f"
    good, usable = 0.9, 0.75

    def values(self, original: ModelOutput, output: ModelOutput) -> Tensor:
        """See `PairMeasure.values`."""
        iou = _mask_iou if original.kind == "masks" else _class_iou
        pairs = zip(_maps(original), _maps(output), strict=True)
        return torch.stack([iou(a, b) for a, b in pairs])


def _maps(output: ModelOutput) -> Tensor:
    """Return the class of each pixel, `[images, ...]`; of masks that overlap, whether a pixel is in them."""
    if output.kind != "segments":
        # The first of the two classes of a mask is yes.
        return output.distributions[0].argmax(dim=-1)
    classes, masks = output.distributions
    seen = classes.softmax(dim=-1)[..., :-1]
    return torch.einsum("iqc,iqhw->ichw", seen, masks.softmax(dim=-1)[..., 0]).argmax(dim=1)


def _class_iou(a: Tensor, b: Tensor) -> Tensor:
    classes = torch.cat([a.unique(), b.unique()]).unique()
    both = [((a == each) & (b == each)).sum() / ((a == each) | (b == each)).sum() for each in classes]
    return torch.stack(both).double().mean()


def _mask_iou(a: Tensor, b: Tensor) -> Tensor:
    first, second = ((each == 0).reshape(-1, each.shape[-2] * each.shape[-1]) for each in (a, b))
    both, either = (first & second).sum(dim=1), (first | second).sum(dim=1)
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones(())).double().mean()
