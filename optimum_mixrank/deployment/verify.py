"""Whether an exported model computes what its source does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.images.batches import Batch
from ..runtime.fidelity import agreement, kl_divergence
from ..runtime.formatting import format_size, shorten
from ..runtime.forward import configured_shape, evaluation_mode
from ..runtime.output_fields import fields_of
from ..runtime.outputs import ModelOutput, select_output
from .image_part import image_part
from .target import FLOAT32, HALF, INT8, ExportedModel


@dataclass(frozen=True)
class Limits:
    """From where on a model counts as broken; None where a measure does not matter.

    Attributes:
        difference: Largest difference of an output, absolute or relative to the largest output, whichever is smaller.
        agreement: Smallest share of images with the same predicted class; one other image is always tolerated.
        kl: Largest mean KL(source ‖ exported), in nats.
    """

    difference: float | None = None
    agreement: float | None = None
    kl: float | None = None


LIMITS = {
    FLOAT32: Limits(difference=1e-4),
    HALF: Limits(difference=0.05, agreement=0.99, kl=0.001),
    INT8: Limits(difference=0.5, agreement=0.95, kl=0.05),
}
"""The limits of each precision. Beside `kl`, `difference` applies only to models that have no classes to compare."""


@dataclass(frozen=True)
class Verification:
    """How far an exported model is from its source; None where a measure does not apply.

    Attributes:
        precision: `"float32"`, `"half"` or `"int8"`: which limits apply.
        num_images: Number of images that were compared.
        max_difference: Largest absolute difference of the outputs (logits, or features of models without classes).
        relative_difference: The same, divided by the largest absolute output of the source.
        num_non_finite: Number of outputs of the exported model that are NaN or Inf.
        agreement: Share of images on which both predict the same class.
        kl: Mean KL(source ‖ exported), in nats.
        top1: Share of labelled images whose class the exported model predicts.
        source_top1: The same for the source.
        problems: What is broken, in words; empty if nothing is.
    """

    precision: str
    num_images: int
    max_difference: float
    relative_difference: float
    num_non_finite: int
    agreement: float | None = None
    kl: float | None = None
    top1: float | None = None
    source_top1: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether all measures are within their limits."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the measures that apply, as JSON values."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {"ok": self.is_ok, **values, "problems": list(self.problems)}


def verify_model(
    source: nn.Module,
    exported: nn.Module,
    batches: Iterable[Batch],
    precision: str | None = None,
    limits: Limits | None = None,
) -> Verification:
    """Compare an exported model with its source on images.

    Args:
        source: The model that was exported, in float32 on the CPU.
        exported: What `open_exported` returns, or a model of Transformers.
        batches: Images, with labels if accuracy is to be measured.
        precision: `"float32"`, `"half"` or `"int8"`; default: that of `exported`.
        limits: From where on it is broken; default: those of the precision in `LIMITS`.

    Raises:
        ValueError: if there are no images, the precision is unknown, or the outputs cannot be compared.
    """
    precision = precision_of(exported) if precision is None else precision
    if precision not in LIMITS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(map(repr, LIMITS))}.")
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("There are no images to compare the models on; the dataset is empty or has been used up.")
    source = image_part(source, first.pixel_values.shape[1:])
    sums = _Sums()
    with evaluation_mode(source), evaluation_mode(exported):
        for batch in chain([first], remaining):
            given = source(pixel_values=batch.pixel_values.float())
            expected = _select(given, source, batch.num_images)
            output = _outputs(exported, _as_input(batch.pixel_values, exported))
            found = _select(_with_names(output, given), source, batch.num_images)
            sums.add(expected, found, batch.labels)
    return sums.judged(precision, LIMITS[precision] if limits is None else limits)


def random_pixels(model: nn.Module, count: int = 32, pixel_values_shape: Sequence[int] | None = None) -> Tensor:
    """Return normally distributed images of the size that a model takes, `[count, channels, height, width]`.

    The shape `(channels, height, width)` is by default that of the model's configuration; `ValueError` if it has none.
    """
    shape = configured_shape(model) if pixel_values_shape is None else pixel_values_shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def precision_of(model: nn.Module) -> str:
    """Return the precision of an exported model, or of a model of Transformers by the dtype of its weights."""
    found = getattr(model, "precision", None)
    if isinstance(found, str):
        return found
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return HALF if types & {torch.float16, torch.bfloat16} else FLOAT32


def _as_input(pixel_values: Tensor, model: nn.Module) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return pixel_values.to(parameters[0].dtype) if parameters else pixel_values.float()


def _outputs(model: nn.Module, pixel_values: Tensor) -> Any:
    try:
        return model(pixel_values=pixel_values)
    except MemoryError:
        raise
    except Exception as error:
        if not isinstance(model, ExportedModel):
            raise
        size = format_size(pixel_values.shape[1:])
        raise ValueError(
            f"The exported model does not run on images of {size}, on which its source runs: it is another model, or was "
            f"exported for images of another size. ({shorten(str(error))})"
        ) from error


def _with_names(output: Any, given: Any) -> Any:
    """Give outputs whose names say nothing those of the source: of its outputs in their order, or of its first alike."""
    fields = {name: each for name, each in fields_of(given).items() if isinstance(each, Tensor)}
    if not isinstance(output, Mapping) or output.keys() & fields.keys():
        return output
    shapes = [getattr(value, "shape", None) for value in output.values()]
    if shapes == [each.shape for each in fields.values()]:
        return dict(zip(fields, output.values(), strict=True))
    if len(shapes) > 1:
        return output
    alike = (name for name, each in fields.items() if each.shape == shapes[0])
    return {next(alike, next(iter(output))): next(iter(output.values()))}


def _select(output: Any, source: nn.Module, count: int) -> ModelOutput:
    return select_output(output, getattr(source, "config", None), (), count)


class _Sums:
    """Sums over images."""

    def __init__(self) -> None:
        self.num_images = self.num_labelled = self.num_non_finite = 0
        self.difference = self.largest = 0.0
        self.values: dict[str, float] = {}

    def add(self, expected: ModelOutput, found: ModelOutput, labels: Tensor | None) -> None:
        pairs = list(zip(_tensors(expected), _tensors(found), strict=False))
        if len(_tensors(expected)) != len(_tensors(found)) or any(one.shape != two.shape for one, two in pairs):
            shapes = [[list(each.shape) for each in _tensors(output)] for output in (expected, found)]
            raise ValueError(
                f"The source gives outputs of shape {shapes[0]} and the exported model {shapes[1]}: they are not the "
                "same model, or were exported with another head."
            )
        for one, two in pairs:
            finite = torch.isfinite(two)
            self.num_non_finite += int((~finite).sum())
            if finite.any():
                self.difference = max(self.difference, (two - one)[finite].abs().max().item())
            self.largest = max(self.largest, one.abs().max().item())
        self.num_images += len(pairs[0][0])
        if expected.logits is not None and found.logits is not None:
            self._compare_classes(expected.logits.float(), found.logits.float().nan_to_num(), labels)

    def _compare_classes(self, expected: Tensor, found: Tensor, labels: Tensor | None) -> None:
        sums = {
            "agreement": agreement(expected, found).sum().item(),
            "kl": kl_divergence(expected, found).sum().item(),
        }
        if labels is not None:
            self.num_labelled += len(labels)
            sums["top1"] = (found.argmax(dim=1) == labels).sum().item()
            sums["source_top1"] = (expected.argmax(dim=1) == labels).sum().item()
        for name, value in sums.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def judged(self, precision: str, limits: Limits) -> Verification:
        counts = {"top1": self.num_labelled, "source_top1": self.num_labelled}
        means = {name: value / counts.get(name, self.num_images) for name, value in self.values.items()}
        relative = self.difference / self.largest if self.largest else self.difference
        problems = self._problems(limits, means, min(self.difference, relative))
        return Verification(
            precision,
            self.num_images,
            self.difference,
            relative,
            self.num_non_finite,
            problems=tuple(problems),
            **means,
        )

    def _problems(self, limits: Limits, means: Mapping[str, float], difference: float) -> list[str]:
        problems = []
        if self.num_non_finite:
            problems.append(f"{self.num_non_finite:,} outputs are NaN or Inf")
        has_classes = "kl" in means and limits.kl is not None
        if limits.difference is not None and not has_classes and difference > limits.difference:
            problems.append(f"the outputs differ by {self.difference:.3g}, the limit is {limits.difference:g}")
        if limits.kl is not None and means.get("kl", 0.0) > limits.kl:
            problems.append(f"KL is {means['kl']:.3g} nats, the limit is {limits.kl:g}")
        if limits.agreement is not None and "agreement" in means:
            others = round((1 - means["agreement"]) * self.num_images)
            if others > max(1, (1 - limits.agreement) * self.num_images):
                share = f"{means['agreement']:.2%}, the limit is {limits.agreement:.0%}"
                problems.append(f"both predict the same class for {share}")
        return problems


def _tensors(output: ModelOutput) -> tuple[Tensor, ...]:
    return tuple(tensor.float().cpu() for tensor in output.tensors)
