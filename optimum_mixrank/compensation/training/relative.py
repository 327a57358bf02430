"""Squared errors of features, relative to how much the features vary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.distributed import SINGLE_PROCESS, Processes


def relative_loss(
    reference: Tensor, feature: Tensor, share: float = 1.0, processes: Processes = SINGLE_PROCESS
) -> Tensor:
    """Squared error over the variance of the reference, each feature centred over all tokens of the batch.

    Args:
        reference: `[batch, ..., width]`.
        feature: The same shape.
        share: Of the batch, that these are; the rest is with other processes.
        processes: Those that share the batch out; all call this, and what they get adds up to the loss of the batch.
    """
    return share * squared_error(reference, feature) / token_variance([reference], [share], processes)


def squared_error(reference: Tensor, feature: Tensor) -> Tensor:
    """Mean over all entries, in float32."""
    return (feature.float() - reference.float()).square().mean()


@torch.no_grad()
def token_variance(
    references: Sequence[Tensor], shares: Sequence[float], processes: Processes = SINGLE_PROCESS
) -> Tensor:
    """Variance over tokens, a mean over features; at least a tiny positive number.

    Args:
        references: Features, each `[batch, ..., width]`, at least one.
        shares: Of all tokens, that each of them holds.
        processes: Those that share the tokens out; all call this and get the same.
    """
    weighted = list(zip(shares, references, strict=True))
    mean = processes.sum_(torch.stack([share * _tokens(each).mean(dim=0) for share, each in weighted]).sum(dim=0))
    variances = [share * (_tokens(each) - mean).square().mean() for share, each in weighted]
    return processes.sum_(torch.stack(variances).sum()).clamp_min(1e-12)


def _tokens(reference: Tensor) -> Tensor:
    return reference.float().flatten(0, -2)
