"""Run a compressed model, and its original beside it, over images and measure both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.images.batches import ImageBatches
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.fidelity import agreement, kl_divergence, relative_error
from ..runtime.forward import evaluation_mode
from ..runtime.outputs import ModelOutput, select_output
from .top_k import label_ranks


class LabelledBatch(Protocol):
    """What an evaluation needs of a batch."""

    @property
    def pixel_values(self) -> Tensor:
        """`[batch, channels, height, width]`."""

    @property
    def labels(self) -> Tensor | None:
        """`[batch]`, class indices of the model; None if they are not known."""


@dataclass(frozen=True)
class EvaluationResult:
    """Means over images; None where a measure does not apply.

    Attributes:
        num_images: Images that were seen.
        top1: Share of images whose class comes first, in [0, 1]. Needs labels and a class head.
        top5: Share of images whose class is among the first five.
        reference_top1: `top1` of the original model.
        reference_top5: `top5` of the original model.
        agreement: Share of images on which both models predict the same class. Needs the original and a class head.
        kl: KL(original ‖ compressed) of the predicted distributions, in nats.
        feature_error: Relative squared error of the output, `‖f - f_ref‖² / ‖f_ref‖²`, of models without a class head.
    """

    num_images: int
    top1: float | None = None
    top5: float | None = None
    reference_top1: float | None = None
    reference_top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    feature_error: float | None = None

    def details(self) -> list[str]:
        """What was measured, in words: `2,000 images`, `top-1 90.45 % (original 90.30 %)`, …."""
        found = [f"{self.num_images:,} images"]
        if self.top1 is not None:
            original = "" if self.reference_top1 is None else f" (original {self.reference_top1:.2%})"
            found.append(f"top-1 {self.top1:.2%}{original}")
        if self.agreement is not None:
            found.append(f"agreement {self.agreement:.2%}")
        if self.kl is not None:
            found.append(f"KL {self.kl:.4g} nats")
        if self.feature_error is not None:
            found.append(f"relative error of features {self.feature_error:.4g}")
        return found


def evaluate_model(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    reference: nn.Module | None = None,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
) -> EvaluationResult:
    """Measure a model on images; with its original, also what was lost against it.

    Every image goes once through each model, without gradients and in evaluation mode, on the model's device and in
    its dtype. Afterwards both models are as they were. Models with one softmax over classes are compared by their
    predictions. All others (encoders, backbones, dense, multi-label or regression heads) are compared by the relative
    error of their output: feature maps, else the last hidden state, else what the head gives.

    Args:
        model: The compressed model.
        batches: Batches with `pixel_values` and `labels` (or None); of several processes, those of this one.
        reference: The original model.
        progress: Whether to show a progress bar.
        processes: Those that share the batches out.

    Returns:
        Means over all images, of all processes.

    Raises:
        ValueError: if there is nothing to measure (no image; neither original nor labels), labels do not fit the
            model or only some batches have them, the models' outputs differ in shape, or an output is NaN or Inf.
    """
    means = _Means()
    num_images = getattr(batches, "num_images", None)
    share = None if num_images is None else math.ceil(num_images / processes.count)
    bar = logging.tqdm(total=share, desc="Evaluating", unit="img", disable=not progress)
    with processes.raise_on_all_ranks(), ExitStack() as stack:
        stack.enter_context(bar)
        for each in (model,) if reference is None else (model, reference):
            stack.enter_context(evaluation_mode(each))
        for batch in batches:
            output = _run(model, batch.pixel_values, "The model")
            original = None if reference is None else _run(reference, batch.pixel_values, "The original model")
            means.add(_measure(output, original, batch.labels), len(batch.pixel_values))
            bar.update(len(batch.pixel_values))
    if isinstance(batches, ImageBatches):
        batches.merge_across_processes()
    total = _Means()
    for found in processes.gather(means):
        total.merge(found)
    return total.result()


@dataclass
class _Means:
    num_images: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor], num_images: int) -> None:
        if not values:
            raise ValueError(
                "There is nothing to measure: give labels (and a model with a class head) for accuracy, or the "
                "original as `reference`."
            )
        self.merge(_Means(num_images, {name: value.double().sum().item() for name, value in values.items()}))

    def merge(self, other: _Means) -> None:
        if self.num_images and other.num_images and other.sums.keys() != self.sums.keys():
            raise ValueError("Some batches have labels and some have none; give labels for all images or for none.")
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.num_images += other.num_images

    def result(self) -> EvaluationResult:
        if not self.num_images:
            raise ValueError("There is no image to evaluate; the dataset is empty or has been used up.")
        return EvaluationResult(
            self.num_images, **{name: total / self.num_images for name, total in self.sums.items()}
        )


def _measure(output: ModelOutput, original: ModelOutput | None, labels: Tensor | None) -> dict[str, Tensor]:
    """The measures that apply, by field of `EvaluationResult`; one value per image, `[batch]`."""
    values = {}
    if labels is not None:
        labels = torch.as_tensor(labels).cpu()
        for prefix, each in (("", output), ("reference_", original)):
            if each is not None and each.logits is not None:
                ranks = label_ranks(each.logits, labels)
                values[f"{prefix}top1"] = ranks < 1
                values[f"{prefix}top5"] = ranks < 5
    if original is None:
        return values
    if output.logits is not None and original.logits is not None:
        values["agreement"] = agreement(original.logits, output.logits)
        values["kl"] = kl_divergence(original.logits, output.logits)
    elif output.logits is None and original.logits is None and len(output.features) == len(original.features):
        errors = [relative_error(*pair) for pair in zip(original.features, output.features, strict=True)]
        values["feature_error"] = torch.stack(errors).mean(dim=0)
    else:
        raise ValueError(
            "The model and its original have different heads, so their outputs cannot be compared; load both with the "
            "same class."
        )
    return values


def _run(model: nn.Module, pixel_values: Tensor, who: str) -> ModelOutput:
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    # Parameters that are offloaded to disk are on the meta device; Accelerate then moves the input itself.
    device = next((parameter.device for parameter in parameters if not parameter.is_meta), pixel_values.device)
    dtype = parameters[0].dtype if parameters else pixel_values.dtype
    # On the CPU two models can be compared.
    pixel_values = pixel_values.to(device, dtype, non_blocking=pixel_values.is_pinned())
    output = select_output(model(pixel_values=pixel_values), getattr(model, "config", None)).cpu()
    for tensor in (*output.features, *(() if output.logits is None else (output.logits,))):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{who} gives NaN or Inf. Check its weights and the images; a half-precision model may overflow, load "
                "it with dtype='float32'."
            )
    return output
