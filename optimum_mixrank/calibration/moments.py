"""Streaming moments: tensors in, tensors out; single samples are not kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.distributed import Processes
from ..runtime.precision import float32_products


class MomentAccumulator:
    """Mean and covariance (or variance) of a stream of vectors.

    The vectors are shifted by the mean of the first batch before they are multiplied, so that no digits cancel if the
    mean is much larger than the spread. Products are summed over a batch in at least float32 (in float64 for float64
    input) and over batches in float64; only the blocks on and above the diagonal of a covariance are computed.

    With `full` the whole covariance is accumulated, `[n, n]`, else only the variances, `[n]`; without `products` only
    the mean. `count` is the number of vectors so far. Several processes may each see a part of the stream and `merge`
    their moments.
    """

    def __init__(self, full: bool = True, products: bool = True) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._full = full
        self._products = products
        self._sum: Tensor | None = None
        self._product: Tensor | None = None

    def update(self, vectors: Tensor) -> None:
        """Add vectors, `[..., n]`, of any floating point dtype."""
        vectors = vectors.detach().reshape(-1, vectors.shape[-1])
        if len(vectors) == 0:
            return
        if vectors.dtype != torch.float64:
            vectors = vectors.float()
        self._shift = vectors.mean(dim=0) if self._shift is None else self._shift.to(vectors.device)
        centred = vectors - self._shift
        self._sum = _add(self._sum, centred.sum(dim=0))
        if self._products:
            with float32_products(vectors.device):
                if self._full:
                    self._product = _add_upper_gram(self._product, centred)
                else:
                    self._product = _add(self._product, centred.square().sum(dim=0))
        self.count += len(vectors)

    def merge(self, processes: Processes) -> None:
        """Merge the moments of all processes, each of which calls this and holds the same afterwards.

        Means and covariances are merged in float64 (Chan, Golub and LeVeque 1983): with `n_i` vectors of mean `μ_i` and
        covariance `Σ_i` in process i, `n Σ = Σ_i n_i (Σ_i + (μ_i - μ)(μ_i - μ)ᵀ)`.
        """
        sizes = [size for size in processes.gather(None if self._shift is None else len(self._shift)) if size]
        if processes.is_single or not sizes:
            return
        own_mean = self.mean() if self.count else torch.zeros(sizes[0], dtype=torch.float64)
        count = sum(processes.gather(self.count))
        mean = processes.sum_(self.count * own_mean) / count
        scatter = None
        if self._products:
            offset = own_mean - mean
            spread = torch.outer(offset, offset) if self._full else offset.square()
            scatter = processes.sum_(self.count * (spread + self.covariance() if self.count else spread))
        self.count, self._shift, self._sum, self._product = count, mean, torch.zeros_like(mean), scatter

    @property
    def is_finite(self) -> bool:
        """Whether all vectors so far were finite."""
        tensors = (self._shift, self._sum, self._product)
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)

    def mean(self) -> Tensor:
        """Return `E[x]`, `[n]`, float64."""
        shift, offset = self._state()
        return shift.to(offset) + offset

    def covariance(self) -> Tensor:
        """Return `E[x xᵀ] - E[x] E[x]ᵀ`, `[n, n]`, or its diagonal, `[n]`; float64, divided by the count."""
        _, offset = self._state()
        if self._product is None:
            raise ValueError("This accumulator was made for the mean alone.")
        if not self._full:
            return (self._product / self.count - offset.square()).clamp_min(0)
        # Only the upper triangle was summed.
        return (self._product.triu() + self._product.triu(1).T) / self.count - torch.outer(offset, offset)

    def second_moment(self) -> Tensor:
        """Return `E[x xᵀ]` about zero, `[n, n]`, or its diagonal, `[n]`; float64."""
        mean = self.mean()
        return self.covariance() + (torch.outer(mean, mean) if self._full else mean.square())

    @property
    def shift(self) -> Tensor:
        """The vector that is subtracted from all others, `[n]`."""
        return self._state()[0]

    def _state(self) -> tuple[Tensor, Tensor]:
        """Return the shift, and the mean of the shifted vectors."""
        if self._shift is None or self._sum is None or self.count == 0:
            raise ValueError("No vectors have been seen.")
        return self._shift, self._sum / self.count


class PairAccumulator:
    """Means and covariances of a stream of pairs, inputs `[..., n]` and targets `[..., m]`; see `MomentAccumulator`.

    The moments of the inputs are shared with `same_inputs`, an accumulator that gets the same inputs before this one.
    """

    def __init__(self, same_inputs: PairAccumulator | None = None) -> None:
        self._shares_inputs = same_inputs is not None
        self._inputs: MomentAccumulator = MomentAccumulator() if same_inputs is None else same_inputs._inputs
        self._targets = MomentAccumulator(full=False)
        self._cross: Tensor | None = None

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add as many inputs as targets."""
        inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        targets = targets.detach().reshape(-1, targets.shape[-1])
        if inputs.dtype != torch.float64:
            inputs, targets = inputs.float(), targets.float()
        if not self._shares_inputs:
            self._inputs.update(inputs)
        self._targets.update(targets)
        with float32_products(inputs.device):
            product = (targets - self._targets.shift).T @ (inputs - self._inputs.shift)
        self._cross = _add(self._cross, product)

    @property
    def is_finite(self) -> bool:
        """Whether all vectors so far were finite."""
        return self._inputs.is_finite and self._targets.is_finite

    def means(self) -> tuple[Tensor, Tensor]:
        """Return `E[x]`, `[n]`, and `E[t]`, `[m]`, float64."""
        return self._inputs.mean(), self._targets.mean()

    def target_power(self, centred: bool = True) -> Tensor:
        """Return `E ‖t - E t‖²`, or `E ‖t‖²` if not centred; a float64 scalar."""
        return self.target_powers(centred).sum()

    def target_powers(self, centred: bool = True) -> Tensor:
        """Return the variance of every target, or its mean square if not centred, `[m]`, float64."""
        return self._targets.covariance() if centred else self._targets.second_moment()

    def moments(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Return the covariances of inputs, `[n, n]`, and of targets with inputs, `[m, n]`; or their second moments."""
        input_mean, target_mean = self.means()
        covariance, cross = self._inputs.covariance(), self._cross_covariance()
        if centred:
            return covariance, cross
        return covariance + torch.outer(input_mean, input_mean), cross + torch.outer(target_mean, input_mean)

    def _cross_covariance(self) -> Tensor:
        if self._cross is None:
            raise ValueError("No vectors have been seen.")
        input_mean, target_mean = self.means()
        input_offset = input_mean - self._inputs.shift.to(input_mean)
        target_offset = target_mean - self._targets.shift.to(target_mean)
        return self._cross / self._inputs.count - torch.outer(target_offset, input_offset)


def merge_pairs(pairs: Sequence[PairAccumulator], processes: Processes) -> None:
    """Merge pairs with shared inputs, which the first of them holds, across processes; see `MomentAccumulator.merge`."""
    if processes.is_single:
        return
    count = pairs[0]._inputs.count
    # The moments of this process, before they are merged.
    own = [(*pair.means(), pair._cross_covariance()) if count else None for pair in pairs]
    pairs[0]._inputs.merge(processes)
    for pair, found in zip(pairs, own, strict=True):
        pair._targets.merge(processes)
        input_mean, target_mean = pair.means()
        scatter = torch.zeros(len(target_mean), len(input_mean), dtype=torch.float64)
        if found is not None:
            input_own, target_own, cross = found
            scatter = count * (cross + torch.outer(target_own - target_mean, input_own - input_mean))
        pair._cross = processes.sum_(scatter)


class MeanInputAccumulator:
    """Mean over images of the inputs of a layer, `[tokens, n]`: the representative input (arXiv 2402.06004).

    A number of tokens that changes is a ValueError.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Add inputs, `[..., tokens, n]`; leading dimensions are images (or windows); `[images, n]` is one token each."""
        inputs = inputs.detach()
        inputs = inputs[:, None] if inputs.ndim == 2 else inputs.reshape(-1, *inputs.shape[-2:])
        if self._sum is not None:
            _check_tokens(self._sum.shape, inputs.shape[1:])
        self._sum = _add(self._sum, inputs.double().sum(dim=0) if inputs.device.type != "mps" else inputs.sum(dim=0))
        self.count += len(inputs)

    def merge(self, processes: Processes) -> None:
        """Merge the inputs of all processes, each of which calls this and holds the same afterwards."""
        if processes.is_single:
            return
        shapes = [shape for shape in processes.gather(None if self._sum is None else self._sum.shape) if shape]
        for shape in shapes:
            _check_tokens(shapes[0], shape)
        if self._sum is None and shapes:
            self._sum = torch.zeros(shapes[0], dtype=torch.float64)
        if self._sum is not None:
            processes.sum_(self._sum)
        self.count = sum(processes.gather(self.count))

    @property
    def is_finite(self) -> bool:
        """Whether all inputs so far were finite."""
        return self._sum is None or bool(torch.isfinite(self._sum).all())

    def mean(self) -> Tensor:
        """Return the representative input, `[tokens, n]`, float64."""
        if self._sum is None:
            raise ValueError("No inputs have been seen.")
        return self._sum / self.count


def _check_tokens(before: torch.Size, now: torch.Size) -> None:
    if before != now:
        raise ValueError(
            f"The number of tokens changed from {before[0]} to {now[0]}; a mean input needs images of one size. Use "
            "metric='second_moment'."
        )


def _add(total: Tensor | None, batch: Tensor) -> Tensor:
    """Add to a float64 total, on the batch's device if that supports float64, else on the host."""
    batch = batch.to(_device_of_total(batch), torch.float64)
    return batch if total is None else total.add_(batch)


def _add_upper_gram(total: Tensor | None, vectors: Tensor) -> Tensor:
    """Add the upper triangle of `XᵀX` to a float64 total, `[n, n]`; values below the diagonal are meaningless."""
    size, device = vectors.shape[1], _device_of_total(vectors)
    total = torch.zeros(size, size, dtype=torch.float64, device=device) if total is None else total.to(device)
    # Narrow panels do not keep a GPU busy.
    width = 192 if vectors.device.type == "cpu" else 1024
    for start in range(0, size, width):
        stop = min(start + width, size)
        panel = vectors[:, start:stop].T @ vectors[:, start:]
        total[start:stop, start:].add_(panel.to(device))
    return total


def _device_of_total(batch: Tensor) -> torch.device:
    return torch.device("cpu") if batch.device.type == "mps" else batch.device
