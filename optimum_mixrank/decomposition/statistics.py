"""The calibration statistics of a layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
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
    """Covariance of the output `W x`, `[out_features, out_features]`; a bias does not change it."""

    GRADIENT_MOMENT = "gradient_moment"
    """Fisher information `F` of the output: `E[g gᵀ]` over tokens, `[out_features, out_features]`. `g` is the gradient of
    the log-likelihood with respect to the layer's output at a token, for labels drawn from the model itself."""

    INPUT_GRADIENT_MOMENT = "input_gradient_moment"
    """Second moment of the gradients of the input, `E[(Wᵀg) (Wᵀg)ᵀ] = WᵀFW`, `[in_features, in_features]`: all that
    matters of `F` for weights whose columns are combinations of those of `W`."""

    GRADIENT_ENERGY = "gradient_energy"
    """`E[‖g‖²] = tr F`, `[]`."""

    REPRESENTATIVE_INPUT = "representative_input"
    """Mean of the inputs over images, `[tokens, in_features]` (arXiv 2402.06004)."""

    @property
    def of_input(self) -> bool:
        """Whether layers that share their input share it too."""
        return self not in GRADIENT_STATISTICS and self is not Statistic.OUTPUT_COVARIANCE

    def shape(self, out_features: int, in_features: int, tokens: int = 1) -> tuple[int, ...]:
        """Return the shape of the tensor for a layer that sees `tokens` vectors per image."""
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


GRADIENT_STATISTICS = frozenset(
    {Statistic.GRADIENT_MOMENT, Statistic.INPUT_GRADIENT_MOMENT, Statistic.GRADIENT_ENERGY}
)
"""Statistics computed from gradients."""

COMPENSATION_STATISTICS = GRADIENT_STATISTICS | {Statistic.REPRESENTATIVE_INPUT}
"""Statistics that compensation needs too; only decomposition needs the others."""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of a layer, in float64; those that were not requested are None. See `Statistic` for shapes.

    `centred` says whether they are taken about the mean, as for a layer whose bias absorbs the mean of the error.
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
        """The number of vectors that the layer sees per image; 1 if the number of images is unknown."""
        return self.num_tokens / self.num_images if self.num_images else 1.0

    @property
    def has_gradients(self) -> bool:
        """Whether they include the Fisher information of the output."""
        return self.gradient_moment is not None or self.input_gradient_moment is not None

    @property
    def total_gradient_energy(self) -> Tensor:
        """`E[‖g‖²]`, `[]`, from whichever gradient statistic is there."""
        moment = self.gradient_moment
        return self.require(Statistic.GRADIENT_ENERGY) if moment is None else moment.trace()

    def about_zero(self, weight: Tensor) -> LayerStatistics:
        """Return the statistics about zero instead of the mean, for a layer with weight `W` and no bias.

        Covariances become second moments, `E[x xᵀ] = Σ + μ μᵀ`.
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
        return replace(self, centred=False, **changes)

    def only(self, statistics: Collection[Statistic], device: torch.device | str | None = None) -> LayerStatistics:
        """Return the mean of the inputs and the given statistics without the others; on a device, if given."""
        values: dict[str, Any] = {}
        for statistic in Statistic:
            wanted = statistic is Statistic.INPUT_MEAN or statistic in statistics
            tensor = getattr(self, statistic.value) if wanted else None
            values[statistic.value] = tensor if tensor is None or device is None else tensor.to(device)
        return replace(self, **values)

    def require(self, statistic: Statistic) -> Tensor:
        """Return the tensor of a statistic.

        Raises:
            ValueError: if it was not collected.
        """
        tensor = getattr(self, statistic.value)
        if tensor is None:
            raise ValueError(
                f"The statistic {statistic.value!r} was not collected; calibrate with the metric that needs it."
            )
        return tensor
