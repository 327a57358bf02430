"""Streaming moments: tensors in, tensors out; nothing is kept of single samples."""

from __future__ import annotations

import torch
from torch import Tensor


class MomentAccumulator:
    """Mean and covariance (or variance) of a stream of vectors.

    The vectors are shifted by the mean of the first batch before anything is multiplied, so that a mean much larger
    than the spread cancels nothing. Products are summed over a batch in float32 (float64 for float64 input) and over
    batches in float64.

    Args:
        full: Whether to accumulate the whole covariance, `[n, n]`, or the variances alone, `[n]`.
        products: False to accumulate the mean alone.
    """

    def __init__(self, full: bool = True, products: bool = True) -> None:
        self.count = 0
        self._full = full
        self._products = products
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None
        self._product: Tensor | None = None

    def update(self, vectors: Tensor) -> None:
        """Take in vectors, `[..., n]`, of any floating point dtype."""
        vectors = vectors.detach().reshape(-1, vectors.shape[-1])
        if len(vectors) == 0:
            return
        if vectors.dtype != torch.float64:
            vectors = vectors.float()
        if self._shift is None:
            self._shift = vectors.mean(dim=0)
        centred = vectors - self._shift
        self._sum = _add(self._sum, centred.sum(dim=0))
        if self._products:
            # Autocast, under which the model may run, would multiply in half precision.
            with torch.autocast(vectors.device.type, enabled=False):
                product = centred.T @ centred if self._full else centred.square().sum(dim=0)
            self._product = _add(self._product, product)
        self.count += len(vectors)

    @property
    def is_finite(self) -> bool:
        """Whether all vectors so far were free of NaN and Inf."""
        tensors = (self._sum, self._product)
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)

    def mean(self) -> Tensor:
        """`E[x]`, `[n]`, float64."""
        shift, total = self._totals()
        return shift.to(total) + self._offset()

    def covariance(self) -> Tensor:
        """`E[x xᵀ] - E[x] E[x]ᵀ`, `[n, n]`, or its diagonal, `[n]`; float64, divided by the count."""
        self._totals()
        if self._product is None:
            raise ValueError("This accumulator was made for the mean alone.")
        offset = self._offset()
        if not self._full:
            return (self._product / self.count - offset.square()).clamp_min(0)
        covariance = self._product / self.count - torch.outer(offset, offset)
        return (covariance + covariance.T) / 2

    def second_moment(self) -> Tensor:
        """`E[x xᵀ]` about zero, `[n, n]`, float64."""
        mean = self.mean()
        return self.covariance() + torch.outer(mean, mean)

    def _offset(self) -> Tensor:
        return self._totals()[1] / self.count

    def _totals(self) -> tuple[Tensor, Tensor]:
        if self._shift is None or self._sum is None or self.count == 0:
            raise ValueError("No vectors have been seen.")
        return self._shift, self._sum


class PairAccumulator:
    """Means and covariances of a stream of pairs: inputs, `[..., n]`, and targets, `[..., m]`.

    Shifted and summed as in `MomentAccumulator`.

    Args:
        same_inputs: An accumulator that gets the very same inputs, and gets them first; their moments are shared.
    """

    def __init__(self, same_inputs: PairAccumulator | None = None) -> None:
        self._shares_inputs = same_inputs is not None
        self._inputs: MomentAccumulator = MomentAccumulator() if same_inputs is None else same_inputs._inputs
        self._targets = MomentAccumulator(products=False)
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._cross: Tensor | None = None

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Take in as many inputs as targets."""
        inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        targets = targets.detach().reshape(-1, targets.shape[-1])
        if inputs.dtype != torch.float64:
            inputs, targets = inputs.float(), targets.float()
        if self._shifts is None:
            self._shifts = inputs.mean(dim=0), targets.mean(dim=0)
        if not self._shares_inputs:
            self._inputs.update(inputs)
        self._targets.update(targets)
        with torch.autocast(inputs.device.type, enabled=False):
            product = (targets - self._shifts[1]).T @ (inputs - self._shifts[0])
        self._cross = _add(self._cross, product)

    @property
    def is_finite(self) -> bool:
        """Whether all vectors so far were free of NaN and Inf."""
        return self._inputs.is_finite and self._targets.is_finite

    def means(self) -> tuple[Tensor, Tensor]:
        """`E[x]`, `[n]`, and `E[t]`, `[m]`, float64."""
        return self._inputs.mean(), self._targets.mean()

    def moments(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Covariances of the inputs, `[n, n]`, and of targets with inputs, `[m, n]`; or second moments about zero."""
        input_mean, target_mean = self.means()
        if self._shifts is None or self._cross is None:
            raise ValueError("No vectors have been seen.")
        input_shift, target_shift = self._shifts
        offset = torch.outer(target_mean - target_shift.to(target_mean), input_mean - input_shift.to(input_mean))
        covariance, cross = self._inputs.covariance(), self._cross / self._inputs.count - offset
        if centred:
            return covariance, cross
        return covariance + torch.outer(input_mean, input_mean), cross + torch.outer(target_mean, input_mean)


class MeanInputAccumulator:
    """Mean over images of the inputs of a layer, `[tokens, n]`: the paper's representative input."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Take in inputs, `[..., tokens, n]`; leading dimensions are images (or windows); `[images, n]` is one token.

        Raises:
            ValueError: if the number of tokens changes.
        """
        inputs = inputs.detach()
        inputs = inputs[:, None] if inputs.ndim == 2 else inputs.reshape(-1, *inputs.shape[-2:])
        if self._sum is not None and self._sum.shape != inputs.shape[1:]:
            raise ValueError(
                f"The number of tokens changed from {self._sum.shape[0]} to {inputs.shape[1]}; a mean input needs "
                "images of one size. Use metric='second_moment'."
            )
        self._sum = _add(self._sum, inputs.double().sum(dim=0) if inputs.device.type != "mps" else inputs.sum(dim=0))
        self.count += len(inputs)

    @property
    def is_finite(self) -> bool:
        """Whether all inputs so far were free of NaN and Inf."""
        return self._sum is None or bool(torch.isfinite(self._sum).all())

    def mean(self) -> Tensor:
        """The representative input, `[tokens, n]`, float64."""
        if self._sum is None:
            raise ValueError("No inputs have been seen.")
        return self._sum / self.count


def _add(total: Tensor | None, batch: Tensor) -> Tensor:
    """Add to a float64 total, which lives on the batch's device where that knows float64, else on the host."""
    device = torch.device("cpu") if batch.device.type == "mps" else batch.device
    batch = batch.to(device, torch.float64)
    return batch if total is None else total.add_(batch)
