"""How far the outputs of a compressed model are from the original's, its reference: one value per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .model_output import ModelOutput
from .precision import to_float64


DIFFERENT_HEADS = (
    "The model and its original have different heads, so their outputs cannot be compared; load both with the same "
    "class."
)


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence KL(original ‖ compressed) of the predicted distributions.

    `Σ_k p_k (log p_k - log q_k)` with `p = softmax(reference_logits)`, `q = softmax(logits)`: from two `[images, classes]`
    to `[images]`, float64, in nats, not negative.

    Raises:
        ValueError: if the shapes differ or are not `[images, classes]`.
    """
    _check_logits(reference_logits, logits)
    log_p = to_float64(reference_logits).log_softmax(dim=-1)
    log_q = to_float64(logits).log_softmax(dim=-1)
    # Rounding can take the divergence of two equal distributions below zero.
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0)


def mean_kl_divergence(reference: Sequence[Tensor], distributions: Sequence[Tensor]) -> Tensor:
    """Return the mean of `kl_divergence` over all places of an image, such as pixels, and over several kinds of places.

    From lists of logits `[images, ..., classes]` to `[images]`, float64, in nats.

    Raises:
        ValueError: if the shapes differ.
    """
    found = []
    for original, compressed in zip(reference, distributions, strict=True):
        _check_distributions(original, compressed)
        # Image by image, since there may be many pixels.
        pairs = zip(original.flatten(1, -2), compressed.flatten(1, -2), strict=True)
        found.append(torch.stack([kl_divergence(*pair).mean() for pair in pairs]))
    return torch.stack(found).mean(dim=0)


def output_divergence(reference: ModelOutput, output: ModelOutput) -> Tensor:
    """Return the error of what a model says about images, `[images]`, float64.

    It is KL(original ‖ compressed) in nats of the predicted classes, of images or at every place, plus the relative error
    of features; most outputs have one of the two. Features may have a row for every token rather than for every image.

    Raises:
        ValueError: if the two outputs are of different kinds or shapes.
    """
    if [each is None for each in (reference.logits, output.logits)] in ([True, False], [False, True]):
        raise ValueError(DIFFERENT_HEADS)
    if len(reference.features) != len(output.features) or len(reference.distributions) != len(output.distributions):
        raise ValueError(DIFFERENT_HEADS)
    if reference.logits is not None and output.logits is not None:
        return kl_divergence(reference.logits, output.logits)
    errors = []
    if reference.distributions:
        errors.append(mean_kl_divergence(reference.distributions, output.distributions))
    if reference.features:
        errors.append(mean_relative_error(reference.features, output.features))
    return torch.stack(errors).sum(dim=0)


def agreement(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Return whether both models predict the same class, `[images]`, bool; arguments and errors as `kl_divergence`."""
    _check_logits(reference_logits, logits)
    return reference_logits.argmax(dim=-1) == logits.argmax(dim=-1)


def relative_error(reference_features: Tensor, features: Tensor) -> Tensor:
    """Return the squared error of an image's features relative to their energy, `‖f - f_ref‖² / ‖f_ref‖²`.

    From two `[images, ...]` to `[images]`, float64: 0 where both are zero, infinite where only the original's are.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference_features.shape != features.shape or features.ndim < 2:
        raise ValueError(
            f"Features of shape {tuple(features.shape)} cannot be compared with the original's, "
            f"{tuple(reference_features.shape)}; both must be [images, ...] for the same images."
        )
    reference = to_float64(reference_features).flatten(1)
    error = (to_float64(features).flatten(1) - reference).square().sum(dim=1)
    # Where both are zero, 0 / 0 would give NaN.
    return torch.where(error == 0, error, error / reference.square().sum(dim=1))


def mean_relative_error(reference_features: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Return the mean of the relative errors of several features of an image; see `relative_error`.

    From lists of `[images, ...]` to `[images]`, float64. Features that are zero in the original have no relative error
    and are passed over; where all of them are, the error is infinite.
    """
    pairs = zip(reference_features, features, strict=True)
    errors = torch.stack([relative_error(*pair) for pair in pairs])
    finite = ~torch.isinf(errors)
    mean = torch.where(finite, errors, 0.0).sum(dim=0) / finite.sum(dim=0)
    return torch.where(finite.any(dim=0), mean, torch.inf)


def _check_logits(reference_logits: Tensor, logits: Tensor) -> None:
    if logits.ndim != 2 or reference_logits.shape != logits.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} cannot be compared with the original's, "
            f"{tuple(reference_logits.shape)}; both must be [images, classes] of the same head."
        )


def _check_distributions(reference: Tensor, distributions: Tensor) -> None:
    if distributions.ndim < 3 or reference.shape != distributions.shape:
        raise ValueError(
            f"Distributions of shape {tuple(distributions.shape)} cannot be compared with the original's, "
            f"{tuple(reference.shape)}; both must be [images, ..., classes] of the same head."
        )
