"""Streaming moments: tensors in, tensors out; nothing is kept of single samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed import Processes
from ..precision import float32_products


class MomentAccumulator:
    """Mean and covariance (or variance) of a stream of vectors.

    The vectors are shifted by the mean of the first batch before anything is multiplied, so that a mean much larger
    than the spread cancels nothing. Products are summed over a batch in float32 (float64 for float64 input), never in
    less, and over batches in float64; of a covariance, the blocks on and above the diagonal alone are computed.

    Several processes may each take in a part of the stream: one of them takes in the first batch and gives the others
    its `shift`; afterwards all call `reduce`. The sums are then those of one process up to the order of summation.

    Args:
        full: Whether to accumulate the whole covariance, `[n, n]`, or the variances alone, `[n]`.
        products: False to accumulate the mean alone.

    Attributes:
        count: Vectors so far.
        shift: What is subtracted from every vector, `[n]`; None before the first batch.
    """

    def __init__(self, full: bool = True, products: bool = True) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self._full = full
        self._products = products
        self._sum: Tensor | None = None
        self._product: Tensor | None = None

    def update(self, vectors: Tensor) -> None:
        """Take in vectors, `[..., n]`, of any floating point dtype."""
        vectors = vectors.detach().reshape(-1, vectors.shape[-1])
        if len(vectors) == 0:
            return
        if vectors.dtype != torch.float64:
            vectors = vectors.float()
        # From another process it comes on the host.
        self.shift = vectors.mean(dim=0) if self.shift is None else self.shift.to(vectors.device)
        centred = vectors - self.shift
        self._sum = _add(self._sum, centred.sum(dim=0))
        if self._products:
            with float32_products(vectors.device):
                if self._full:
                    self._product = _add_upper_gram(self._product, centred)
                else:
                    self._product = _add(self._product, centred.square().sum(dim=0))
        self.count += len(vectors)

    def reduce(self, processes: Processes) -> None:
        """Take in what all processes have seen; all hold the same then. The shift must be the same everywhere."""
        if processes.is_alone or self.shift is None:
            return
        size = len(self.shift)
        if self._sum is None:
            # This process saw nothing.
            self._sum = _add(None, self.shift.new_zeros(size))
        if self._products and self._product is None:
            self._product = _add(None, self.shift.new_zeros((size, size) if self._full else size))
        for total in (self._sum, self._product):
            if total is not None:
                processes.sum_(total)
        self.count = sum(processes.gather(self.count))

    def state_dict(self) -> dict[str, Tensor]:
        """All that has been seen; `load_state_dict` is the exact inverse."""
        state = {"shift": self.shift, "sum": self._sum, "product": self._product}
        tensors = {name: tensor for name, tensor in state.items() if tensor is not None}
        return {**tensors, "count": torch.tensor(self.count)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what another accumulator of the same kind had seen."""
        self.count = int(tensors["count"])
        self.shift, self._sum, self._product = (tensors.get(name) for name in ("shift", "sum", "product"))

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
        # Below the diagonal nothing was summed.
        product = self._product.triu() + self._product.triu(1).T
        return product / self.count - torch.outer(offset, offset)

    def second_moment(self) -> Tensor:
        """`E[x xᵀ]` about zero, `[n, n]`, or its diagonal, `[n]`; float64."""
        mean = self.mean()
        return self.covariance() + (torch.outer(mean, mean) if self._full else mean.square())

    def _offset(self) -> Tensor:
        return self._totals()[1] / self.count

    def _totals(self) -> tuple[Tensor, Tensor]:
        if self.shift is None or self._sum is None or self.count == 0:
            raise ValueError("No vectors have been seen.")
        return self.shift, self._sum


class PairAccumulator:
    """Means and covariances of a stream of pairs: inputs, `[..., n]`, and targets, `[..., m]`.

    Shifted, summed and reduced over processes as in `MomentAccumulator`.

    Args:
        same_inputs: An accumulator that gets the very same inputs, and gets them first; their moments are shared.
    """

    def __init__(self, same_inputs: PairAccumulator | None = None) -> None:
        self._shares_inputs = same_inputs is not None
        self._inputs: MomentAccumulator = MomentAccumulator() if same_inputs is None else same_inputs._inputs
        self._targets = MomentAccumulator(full=False)
        self._cross: Tensor | None = None

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Take in as many inputs as targets."""
        inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        targets = targets.detach().reshape(-1, targets.shape[-1])
        if inputs.dtype != torch.float64:
            inputs, targets = inputs.float(), targets.float()
        if not self._shares_inputs:
            self._inputs.update(inputs)
        self._targets.update(targets)
        input_shift, target_shift = self._both_shifts()
        with float32_products(inputs.device):
            product = (targets - target_shift).T @ (inputs - input_shift)
        self._cross = _add(self._cross, product)

    @property
    def shifts(self) -> dict[str, Tensor]:
        """What is subtracted from inputs, `[n]`, and targets, `[m]`; settable before the first batch."""
        shifts = {"inputs": self._inputs.shift, "targets": self._targets.shift}
        return {name: shift for name, shift in shifts.items() if shift is not None}

    @shifts.setter
    def shifts(self, shifts: Mapping[str, Tensor]) -> None:
        self._inputs.shift, self._targets.shift = shifts["inputs"], shifts["targets"]

    def reduce(self, processes: Processes) -> None:
        """See `MomentAccumulator.reduce`; accumulators that share inputs are reduced in the order of their making."""
        if processes.is_alone:
            return
        if not self._shares_inputs:
            self._inputs.reduce(processes)
        self._targets.reduce(processes)
        if self._cross is None:
            input_shift, target_shift = self._both_shifts()
            self._cross = _add(None, target_shift.new_zeros(len(target_shift), len(input_shift)))
        processes.sum_(self._cross)

    @property
    def is_finite(self) -> bool:
        """Whether all vectors so far were free of NaN and Inf."""
        return self._inputs.is_finite and self._targets.is_finite

    def means(self) -> tuple[Tensor, Tensor]:
        """`E[x]`, `[n]`, and `E[t]`, `[m]`, float64."""
        return self._inputs.mean(), self._targets.mean()

    def target_power(self, centred: bool = True) -> Tensor:
        """`E ‖t - E t‖²`, or `E ‖t‖²`; a float64 scalar."""
        return (self._targets.covariance() if centred else self._targets.second_moment()).sum()

    def moments(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Covariances of the inputs, `[n, n]`, and of targets with inputs, `[m, n]`; or second moments about zero."""
        input_mean, target_mean = self.means()
        if self._cross is None:
            raise ValueError("No vectors have been seen.")
        input_shift, target_shift = self._both_shifts()
        offset = torch.outer(target_mean - target_shift.to(target_mean), input_mean - input_shift.to(input_mean))
        covariance, cross = self._inputs.covariance(), self._cross / self._inputs.count - offset
        if centred:
            return covariance, cross
        return covariance + torch.outer(input_mean, input_mean), cross + torch.outer(target_mean, input_mean)

    def _both_shifts(self) -> tuple[Tensor, Tensor]:
        if self._inputs.shift is None or self._targets.shift is None:
            raise ValueError("No vectors have been seen.")
        return self._inputs.shift, self._targets.shift


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
        if self._sum is not None:
            self._check_shape(self._sum.shape, inputs.shape[1:])
        self._sum = _add(self._sum, inputs.double().sum(dim=0) if inputs.device.type != "mps" else inputs.sum(dim=0))
        self.count += len(inputs)

    def reduce(self, processes: Processes) -> None:
        """Take in what all processes have seen; all hold the same then.

        Raises:
            ValueError: if they have seen different numbers of tokens.
        """
        if processes.is_alone:
            return
        shapes = [shape for shape in processes.gather(None if self._sum is None else self._sum.shape) if shape]
        for shape in shapes:
            self._check_shape(shapes[0], shape)
        if self._sum is None and shapes:
            self._sum = torch.zeros(shapes[0], dtype=torch.float64)
        if self._sum is not None:
            processes.sum_(self._sum)
        self.count = sum(processes.gather(self.count))

    def state_dict(self) -> dict[str, Tensor]:
        """All that has been seen; `load_state_dict` is the exact inverse."""
        tensors = {} if self._sum is None else {"sum": self._sum}
        return {**tensors, "count": torch.tensor(self.count)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what another accumulator had seen."""
        self.count, self._sum = int(tensors["count"]), tensors.get("sum")

    @property
    def is_finite(self) -> bool:
        """Whether all inputs so far were free of NaN and Inf."""
        return self._sum is None or bool(torch.isfinite(self._sum).all())

    def mean(self) -> Tensor:
        """The representative input, `[tokens, n]`, float64."""
        if self._sum is None:
            raise ValueError("No inputs have been seen.")
        return self._sum / self.count

    @staticmethod
    def _check_shape(before: torch.Size, now: torch.Size) -> None:
        if before != now:
            raise ValueError(
                f"The number of tokens changed from {before[0]} to {now[0]}; a mean input needs images of one size. Use "
                "metric='second_moment'."
            )


def _add(total: Tensor | None, batch: Tensor) -> Tensor:
    """Add to a float64 total, which lives on the batch's device where that knows float64, else on the host."""
    batch = batch.to(_device_of_total(batch), torch.float64)
    # Read from a file, a total lies beside the model's first layer, which may have another device.
    return batch if total is None else total.to(batch.device).add_(batch)


def to_device(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The state of an accumulator where the model runs; sums in float64 stay on the host beside Apple's GPUs."""
    keep = device.type == "mps"
    return {
        name: tensor if keep and tensor.dtype == torch.float64 else tensor.to(device) for name, tensor in state.items()
    }


def _add_upper_gram(total: Tensor | None, vectors: Tensor) -> Tensor:
    """Add the upper triangle of `XᵀX` to a float64 total, panel by panel; what is below the diagonal means nothing.

    Args:
        total: `[n, n]`.
        vectors: `X`, `[count, n]`.
    """
    size, device = vectors.shape[1], _device_of_total(vectors)
    total = torch.zeros(size, size, dtype=torch.float64, device=device) if total is None else total.to(device)
    # A GPU is not busy with narrow panels.
    width = 192 if vectors.device.type == "cpu" else 1024
    for start in range(0, size, width):
        stop = min(start + width, size)
        panel = vectors[:, start:stop].T @ vectors[:, start:]
        total[start:stop, start:].add_(panel.to(device))
    return total


def _device_of_total(batch: Tensor) -> torch.device:
    return torch.device("cpu") if batch.device.type == "mps" else batch.device
