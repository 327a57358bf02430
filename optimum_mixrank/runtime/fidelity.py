"""How far a compressed model is from its original, as pure functions of tensors, one value per image, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(original ‖ compressed) of the predicted distributions.

    `Σ_k p_k (log p_k - log q_k)` with `p = softmax(reference_logits)`, `q = softmax(logits)`.

    Args:
        reference_logits: Of the original model, `[images, classes]`.
        logits: Of the compressed model, `[images, classes]`.

    Returns:
        `[images]`, float64, in nats; not negative.

    Raises:
        ValueError: if the shapes differ or are not `[images, classes]`.
    """
    _check_logits(reference_logits, logits)
    log_p = _float64(reference_logits).log_softmax(dim=-1)
    log_q = _float64(logits).log_softmax(dim=-1)
    # Rounding can take the divergence of two equal distributions below zero.
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0)


def agreement(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether both models predict the same class.

    Args:
        reference_logits: Of the original model, `[images, classes]`.
        logits: Of the compressed model, `[images, classes]`.

    Returns:
        `[images]`, bool.

    Raises:
        ValueError: if the shapes differ or are not `[images, classes]`.
    """
    _check_logits(reference_logits, logits)
    return reference_logits.argmax(dim=-1) == logits.argmax(dim=-1)


def relative_error(reference_features: Tensor, features: Tensor) -> Tensor:
    """Squared error of the features of an image, relative to their energy: `‖f - f_ref‖² / ‖f_ref‖²`.

    Args:
        reference_features: Of the original model, `[images, ...]`.
        features: Of the compressed model, `[images, ...]`.

    Returns:
        `[images]`, float64; 0 where both are zero, infinite where only the original's are.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference_features.shape != features.shape or features.ndim < 2:
        raise ValueError(
            f"Features of shape {tuple(features.shape)} cannot be compared with the original's, "
            f"{tuple(reference_features.shape)}; both are to be [images, ...] of the same images."
        )
    reference = _float64(reference_features).flatten(1)
    error = (_float64(features).flatten(1) - reference).square().sum(dim=1)
    # 0 / 0 is no error.
    return torch.where(error == 0, error, error / reference.square().sum(dim=1))


def _check_logits(reference_logits: Tensor, logits: Tensor) -> None:
    if logits.ndim != 2 or reference_logits.shape != logits.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} cannot be compared with the original's, "
            f"{tuple(reference_logits.shape)}; both are to be [images, classes] of the same head."
        )


def _float64(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
