"""Squared errors of features, relative to the variance of the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.distributed import SINGLE_PROCESS, Processes


def relative_loss(
    reference: Tensor, feature: Tensor, share: float = 1.0, processes: Processes = SINGLE_PROCESS
) -> Tensor:
    """Return the squared error over the variance of the reference, each feature centred over all tokens of the batch.

    Args:
        reference: `[batch, ..., width]`.
        feature: The same shape.
        share: Share of the whole batch that these tensors hold; other processes hold the rest.
        processes: The processes that share the batch. All call this; their results add up to the loss of the batch.
    """
    return share * squared_error(reference, feature) / token_variance([reference], [share], processes)


def squared_error(reference: Tensor, feature: Tensor) -> Tensor:
    """Return the mean squared error over all entries, in float32."""
    return (feature.float() - reference.float()).square().mean()


@torch.no_grad()
def token_variance(
    references: Sequence[Tensor], shares: Sequence[float], processes: Processes = SINGLE_PROCESS
) -> Tensor:
    """Return the variance over all tokens, averaged over the features and at least 1e-12.

    Args:
        references: Features, each `[batch, ..., width]`; at least one tensor.
        shares: Share of all tokens that each of them holds.
        processes: The processes that share the tokens; all call this and get the same result.
    """
    weighted = list(zip(shares, references, strict=True))
    mean = processes.sum_(torch.stack([share * _tokens(each).mean(dim=0) for share, each in weighted]).sum(dim=0))
    variances = [share * (_tokens(each) - mean).square().mean() for share, each in weighted]
    return processes.sum_(torch.stack(variances).sum()).clamp_min(1e-12)


def _tokens(reference: Tensor) -> Tensor:
    return reference.float().flatten(0, -2)
