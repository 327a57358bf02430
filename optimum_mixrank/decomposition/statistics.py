"""The calibration statistics of one layer that metrics ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Statistic(str, Enum):
    """Kinds of statistics over all calibration tokens of a layer with weight `W`, `[out_features, in_features]`."""

    INPUT_MEAN = "input_mean"
    """`E[x]`, `[in_features]`."""

    INPUT_VARIANCE = "input_variance"
    """Variance of every input feature, `[in_features]`."""

    INPUT_COVARIANCE = "input_covariance"
    """`E[x xᵀ] - E[x] E[x]ᵀ`, `[in_features, in_features]`."""

    OUTPUT_COVARIANCE = "output_covariance"
    """The same of the output `W x`, `[out_features, out_features]`; a bias does not change it."""

    GRADIENT_MOMENT = "gradient_moment"
    """Fisher information of the output: `E[g gᵀ]` over tokens, `[out_features, out_features]`, where `g` is the gradient
    of an image's log-likelihood by the layer's output at a token, for labels drawn from the model itself."""

    INPUT_GRADIENT_MOMENT = "input_gradient_moment"
    """The same of what the layer passes back to its input, `E[(Wᵀg) (Wᵀg)ᵀ] = WᵀFW`, `[in_features, in_features]`: all
    that matters of `F` to weights whose columns are combinations of those of `W`."""

    GRADIENT_ENERGY = "gradient_energy"
    """`E[‖g‖²] = tr F`, `[]`."""

    REPRESENTATIVE_INPUT = "representative_input"
    """Mean over images of the inputs, `[tokens, in_features]` (arXiv 2402.06004)."""

    @property
    def from_gradients(self) -> bool:
        """Whether it is taken from gradients. Compensation needs these too; the others serve decomposition alone."""
        return self in (Statistic.GRADIENT_MOMENT, Statistic.INPUT_GRADIENT_MOMENT, Statistic.GRADIENT_ENERGY)

    @property
    def of_input(self) -> bool:
        """Whether layers with the same input share it."""
        return not self.from_gradients and self is not Statistic.OUTPUT_COVARIANCE

    def shape(self, out_features: int, in_features: int, tokens: int = 1) -> tuple[int, ...]:
        """Shape of the tensor, for a layer that maps `tokens` vectors for one image."""
        m, n = out_features, in_features
        return {
            Statistic.INPUT_MEAN: (n,),
            Statistic.INPUT_VARIANCE: (n,),
            Statistic.INPUT_COVARIANCE: (n, n),
            Statistic.OUTPUT_COVARIANCE: (m, m),
            Statistic.GRADIENT_MOMENT: (m, m),
            Statistic.INPUT_GRADIENT_MOMENT: (n, n),
            Statistic.GRADIENT_ENERGY: (),
            Statistic.REPRESENTATIVE_INPUT: (tokens, n),
        }[self]


GRADIENT_STATISTICS = frozenset(statistic for statistic in Statistic if statistic.from_gradients)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer, in float64; those that were not asked for are None. See `Statistic` for shapes.

    `centred` says whether the mean of the error is free, since a bias absorbs it.
    """

    num_tokens: int
    num_images: int = 0
    input_mean: Tensor | None = None
    input_variance: Tensor | None = None
    input_covariance: Tensor | None = None
    output_covariance: Tensor | None = None
    representative_input: Tensor | None = None
    gradient_moment: Tensor | None = None
    input_gradient_moment: Tensor | None = None
    gradient_energy: Tensor | None = None
    centred: bool = True

    @property
    def tokens_per_image(self) -> float:
        """How often the layer runs for one image; 1 if the number of images is not known."""
        return self.num_tokens / self.num_images if self.num_images else 1.0

    @property
    def has_gradients(self) -> bool:
        """Whether they tell how much an error of the output matters."""
        return self.gradient_moment is not None or self.input_gradient_moment is not None

    @property
    def total_gradient_energy(self) -> Tensor:
        """`E[‖g‖²]`, `[]`, from whichever statistic of the gradients there is."""
        if self.gradient_moment is not None:
            return self.gradient_moment.trace()
        return self.require(Statistic.GRADIENT_ENERGY)

    def about_zero(self, weight: Tensor) -> LayerStatistics:
        """The same statistics about zero instead of about the mean, for a layer that has no bias to absorb the mean.

        Covariances become second moments, `E[x xᵀ] = Σ + μ μᵀ`.

        Args:
            weight: `W`, `[out_features, in_features]`.
        """
        mean = self.require(Statistic.INPUT_MEAN)
        output_mean = weight @ mean
        changes: dict[str, Tensor] = {}
        if self.input_variance is not None:
            changes["input_variance"] = self.input_variance + mean.square()
        if self.input_covariance is not None:
            changes["input_covariance"] = self.input_covariance + mean.outer(mean)
        if self.output_covariance is not None:
            changes["output_covariance"] = self.output_covariance + output_mean.outer(output_mean)
        return dataclasses.replace(self, centred=False, **changes)

    def only(self, statistics: Collection[Statistic], device: torch.device | str | None = None) -> LayerStatistics:
        """The mean of the inputs and some more of the statistics; the others are let go.

        Args:
            statistics: Those to keep.
            device: Where to keep them; None for where they are.
        """
        values: dict[str, Any] = {}
        for statistic in Statistic:
            tensor = getattr(self, statistic.value)
            wanted = tensor is not None and (statistic is Statistic.INPUT_MEAN or statistic in statistics)
            values[statistic.value] = (tensor if device is None else tensor.to(device)) if wanted else None
        return dataclasses.replace(self, **values)

    def require(self, statistic: Statistic) -> Tensor:
        """The statistic's tensor.

        Raises:
            ValueError: if it was not collected.
        """
        tensor = getattr(self, statistic.value)
        if tensor is None:
            raise ValueError(
                f"The statistic {statistic.value!r} was not collected; calibrate with the metric that needs it."
            )
        return tensor
