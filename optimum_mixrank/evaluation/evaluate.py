"""Run a compressed model over images, with its original beside it, and measure both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.images.batches import Batch, ImageBatches
from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.formatting import counted
from ..runtime.forward import evaluation_mode, placement
from ..runtime.inputs import ModelInputs
from ..runtime.intervals import paired_interval, wilson_interval
from ..runtime.logging import get_logger
from ..runtime.outputs import PLAIN_CALL, ModelCall, ModelOutput
from .measures import MEASURES, Comparison


if TYPE_CHECKING:
    from .accuracy import TopKAccuracy

logger = get_logger(__name__)

COMPRESSED, ORIGINAL = "", "reference_"
"""The two models, by the prefix of their accuracies in `EvaluationResult`."""


@dataclass(frozen=True)
class EvaluationResult:
    """Means over images; None where a measure does not apply.

    Attributes:
        num_images: Number of images evaluated.
        top1: Share of images whose class is predicted first, in [0, 1]. Needs labels and a classification head.
        top5: Share of images whose class is among the first five.
        reference_top1: `top1` of the original model.
        reference_top5: `top5` of the original model.
        agreement: Share of images on which both models predict the same class. Needs the original and such a head.
            Of tokens and pixels it is the share of those.
        kl: KL(original ‖ compressed) of the predicted distributions, in nats: of images, or the mean over pixels, tokens or
            boxes.
        feature_error: Relative squared error of the output, `‖f - f_ref‖² / ‖f_ref‖²`, for models without such a head, and
            of boxes.
        gained: Share of images that only the compressed model classifies correctly; `top1` is `reference_top1` with these
            and without `lost`.
        lost: Share of images that only the original classifies correctly.
        kind: What the models return, such as `"classes"`, `"segmentation"`, `"detection"`, `"depth"` or `"embeddings"`.
        measures: The values of all other measures of this kind by name, such as `"mask_iou"`, `"matched_boxes"`,
            `"correlation"`, `"cosine_similarity"` and `"retrieval_agreement"`; see `evaluation.measures`. Each is an
            attribute too.
    """

    num_images: int
    top1: float | None = None
    top5: float | None = None
    reference_top1: float | None = None
    reference_top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    feature_error: float | None = None
    gained: float | None = None
    lost: float | None = None
    kind: str | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> float | None:
        if not name.startswith("_") and name in MEASURES:
            return self.measures.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return all values by name, those of `measures` among them."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "measures"}
        return {**values, **self.measures}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % intervals: of `top1`, `reference_top1` and `agreement` by Wilson, of `change` in top-1 paired.

        They are about the images: those of another draw from the same source would give such values. Pixels or tokens of
        one image are not independent, so that their agreement has none.
        """
        names = ["top1", "reference_top1", *(["agreement"] if self.kind in (None, "classes") else [])]
        shares = {name: getattr(self, name) for name in names}
        found = {name: wilson_interval(share, self.num_images) for name, share in shares.items() if share is not None}
        if self.gained is not None and self.lost is not None:
            found["change"] = paired_interval(self.gained, self.lost, self.num_images)
        return found

    def facts(self) -> list[str]:
        """Return the result in words: `2,000 images`, `top-1 90.45 % (original 90.30 %)`, …."""
        found = [counted(self.num_images, "image")]
        if self.top1 is not None:
            original = "" if self.reference_top1 is None else f" (original {self.reference_top1:.2%})"
            found.append(f"top-1 {self.top1:.2%}{original}")
        values = self.to_dict()
        found += [measure.brief(values[name]) for name, measure in MEASURES.items() if values.get(name) is not None]
        return found


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    reference: nn.Module | None = None,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
    call: ModelCall = PLAIN_CALL,
) -> EvaluationResult:
    """Measure a model on images and, if its original is given, how far the two differ.

    Every image goes through each model once, without gradients and in evaluation mode, on the model's device and in its
    dtype. Afterwards both models are as they were. They are compared by the measures that suit what they return, which
    need no labels: agreement of classes, IoU of masks, matched boxes, similarity of embeddings, relative error and
    correlation of depth and features.

    An original that is right much less often than its own probabilities promise, or than chance, is warned about: the
    labels are probably in another order than its classes.

    Args:
        model: The compressed model.
        batches: Batches with inputs and `labels` (or None); with several processes, those of this process.
        reference: The original model.
        progress: Whether to show a progress bar.
        processes: The processes among which the batches are distributed.
        call: How the models are called, and which of their outputs are compared.

    Returns:
        Means over all images of all processes.

    Raises:
        ValueError: if there is nothing to measure (no image; neither original nor labels), labels do not fit the
            model or only some batches have them, the models' outputs differ in shape, or an output is NaN or Inf.
    """
    models = {COMPRESSED: model} if reference is None else {COMPRESSED: model, ORIGINAL: reference}
    metrics: dict[str, TopKAccuracy] = {}
    own, total, comparison = _Sums(), _Sums(), Comparison()
    num_images = getattr(batches, "num_images", None)
    share = None if num_images is None else math.ceil(num_images / processes.count)
    bar = logging.tqdm(total=share, desc="Evaluating", unit="img", disable=not progress)
    with processes.raise_on_all_ranks(), ExitStack() as stack:
        stack.enter_context(bar)
        for each in models.values():
            stack.enter_context(evaluation_mode(each))
        for batch in batches:
            inputs = ModelInputs.of(getattr(batch, "inputs", batch.pixel_values))
            outputs = {name: _run(each, inputs, name, call) for name, each in models.items()}
            sums = _count_correct(outputs, batch.labels, metrics)
            if ORIGINAL in outputs:
                comparison.add(outputs[ORIGINAL], outputs[COMPRESSED], len(inputs))
            elif not sums:
                raise ValueError(
                    "There is nothing to measure: give labels (and a model with a classification head) for accuracy, "
                    "or the original as `reference`."
                )
            own.add(_Sums(len(inputs), sums))
            bar.update(len(inputs))
    if isinstance(batches, ImageBatches):
        batches.merge_across_processes()
    for part in processes.gather(own):
        total.add(part)
    total.warn_about_labels(COMPRESSED if reference is None else ORIGINAL)
    return total.means(*comparison.result(processes))


@dataclass
class _Sums:
    """Sums over images, by field of `EvaluationResult`; `_certainty` and `_chance` are of the probabilities of classes."""

    num_images: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        if self.num_images and other.num_images and other.values.keys() != self.values.keys():
            raise ValueError("Some batches have labels and some have none; give labels for all images or for none.")
        for name, value in other.values.items():
            self.values[name] = self.values.get(name, 0.0) + value
        self.num_images += other.num_images

    def means(self, kind: str | None, measures: Mapping[str, float]) -> EvaluationResult:
        if not self.num_images:
            raise ValueError("There are no images to evaluate on; the dataset is empty or has been used up.")
        if any(not math.isfinite(value) for value in measures.values()):
            raise ValueError(
                "The output of the original is zero for an image, so that the relative error of the compressed model is "
                "infinite; name other outputs by `output_names`."
            )
        known = {each.name for each in fields(EvaluationResult)}
        means = {name: value / self.num_images for name, value in self.values.items() if name in known}
        means |= {name: value for name, value in measures.items() if name in known}
        others = {name: value for name, value in measures.items() if name not in known}
        return EvaluationResult(self.num_images, **means, kind=kind, measures=others)

    def warn_about_labels(self, model: str) -> None:
        """Warn if a model is so often wrong that the labels are probably not those of its classes."""
        if f"{model}top1" not in self.values or not self.num_images:
            return
        top1, certainty, chance = (
            self.values[f"{model}{name}"] / self.num_images for name in ("top1", "_certainty", "_chance")
        )
        # A trained model is about as often right as it seems to be, and on images of another kind still half as often.
        if _is_far_below(top1, chance, self.num_images) or (
            top1 < certainty / 3 and _is_far_below(top1, certainty * 2 / 3, self.num_images)
        ):
            logger.warning(
                f"{'The original' if model == ORIGINAL else 'The model'} classifies {top1:.2%} of {self.num_images:,} "
                f"images correctly, where guessing gives {chance:.2%} and its own probabilities promise {certainty:.2%}. "
                "Probably the labels of the dataset are in another order than the classes of the model: compare their "
                "names with `config.id2label`. Or the images are of other classes, or need another image processor."
            )


def _is_far_below(share: float, expected: float, count: int) -> bool:
    """Return whether chance does not explain a share of successes: its probability, by Chernoff's bound, is below 0.5 %."""
    if share >= expected:
        return False
    divergence = (share * math.log(share / expected) if share else 0.0) + (
        (1 - share) * math.log((1 - share) / (1 - expected)) if expected < 1 else math.inf
    )
    return -count * divergence < math.log(0.005)


def _count_correct(
    outputs: Mapping[str, ModelOutput], labels: Tensor | None, metrics: dict[str, TopKAccuracy]
) -> dict[str, float]:
    """Return how many images of a batch each model classifies correctly, with the metric of that model."""
    logits = {name: output.logits for name, output in outputs.items() if output.logits is not None}
    if labels is None or not logits:
        return {}
    # The `evaluate` library takes a second to import and is needed for labelled images only.
    from .accuracy import TopKAccuracy, rank_classes

    labels = torch.as_tensor(labels).cpu()
    sums: dict[str, float] = {}
    right: dict[str, Tensor] = {}
    for name, scores in logits.items():
        if name not in metrics:
            metrics[name] = TopKAccuracy("rankings")
        rankings = rank_classes(scores, labels)
        right[name] = rankings[:, 0] == labels
        correct = metrics[name].compute(predictions=rankings, references=labels, normalize=False)
        sums |= {f"{name}{top}": float(count) for top, count in correct.items()}
        sums[f"{name}_certainty"] = scores.double().softmax(dim=1).amax(dim=1).sum().item()
        sums[f"{name}_chance"] = len(scores) / scores.shape[1]
    if right.keys() >= {COMPRESSED, ORIGINAL}:
        sums["gained"] = float((right[COMPRESSED] & ~right[ORIGINAL]).sum())
        sums["lost"] = float((right[ORIGINAL] & ~right[COMPRESSED]).sum())
    return sums


def _run(model: nn.Module, inputs: ModelInputs, name: str, call: ModelCall) -> ModelOutput:
    """Return the output on the CPU, where those of two models can be compared."""
    device, dtype = placement(model)
    output = call(model, inputs.to(device, dtype, non_blocking=True)).cpu()
    for tensor in output.tensors:
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{'The original model' if name == ORIGINAL else 'The model'} gives NaN or Inf. Check its weights and "
                "the images; a half-precision model may overflow, load it with dtype='float32'."
            )
    return output
