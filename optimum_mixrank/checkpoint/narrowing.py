"""Linear layers made from others: stacked, with fewer inputs or outputs, or with zeros in their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mark_narrow(layer: nn.Module, dense_shape: tuple[int, int], chunks: int = 1) -> None:
    """Note on a layer that has lost units what shape the original had.

    A dense layer stays an ordinary `nn.Linear`, which quantizers and adapters know; the note survives copies.

    Args:
        layer: A dense, factored or shared layer.
        dense_shape: `(out_features, in_features)` of the original.
        chunks: Number of stacked parts of its outputs that have lost the same units.
    """
    setattr(layer, _MARK, (dense_shape, chunks))


def narrow_from(layer: nn.Module) -> tuple[tuple[int, int], int] | None:
    """Return what `mark_narrow` has noted on a layer, or None if it has lost no units."""
    mark: tuple[tuple[int, int], int] | None = getattr(layer, _MARK, None)
    return mark


def forget_narrow(layer: nn.Module) -> None:
    """Remove what `mark_narrow` has noted on a layer: it is an ordinary one."""
    delattr(layer, _MARK)


_MARK = "narrow_from"


def linear_like(dense: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an ordinary linear layer with these values, otherwise like a given one.

    Args:
        dense: Determines dtype, device, trainability and mode.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, or None.
    """
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias is not None, "meta", dense.weight.dtype)
    trainable = dense.weight.requires_grad
    # Contiguous, so that the same kernels run before saving and after loading.
    layer.weight = nn.Parameter(weight.detach().to(dense.weight).contiguous().clone(), requires_grad=trainable)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dense.weight).contiguous().clone(), requires_grad=trainable)
    return layer.train(dense.training)


def selected_rows(dense: nn.Linear, rows: Tensor) -> nn.Linear:
    """Return some of the outputs of a linear layer, given by their indices, int64."""
    rows = rows.to(dense.weight.device)
    return linear_like(dense, dense.weight[rows], None if dense.bias is None else dense.bias[rows])


def selected_columns(dense: nn.Linear, columns: Tensor) -> nn.Linear:
    """Return a linear layer that takes only some of the inputs, given by their indices, int64."""
    return linear_like(dense, dense.weight[:, columns.to(dense.weight.device)], dense.bias)


def stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Return linear layers with the same input as one, their outputs in this order.

    Raises:
        ValueError: if only some of them have a bias, or they have different numbers of inputs.
    """
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)) or len({layer.in_features for layer in layers}) > 1:
        raise ValueError("Layers can only be stacked if they have the same inputs, and all of them a bias or none.")
    device = layers[0].weight.device
    weight = torch.cat([layer.weight.detach().to(device) for layer in layers])
    return linear_like(layers[0], weight, torch.cat([each.detach().to(device) for each in biases]) if biases else None)


def divided(layer: nn.Linear, sizes: Sequence[int]) -> list[nn.Linear]:
    """Return a linear layer as several, with these numbers of outputs; the reverse of `stacked`."""
    rows = torch.arange(layer.out_features).split(list(sizes))
    return [selected_rows(layer, each) for each in rows]


def widened(layer: nn.Linear, shape: tuple[int, int], chunks: int = 1) -> nn.Linear:
    """Return a linear layer with zeros for the outputs and inputs that it lacks.

    Args:
        layer: The layer.
        shape: The shape of the result, `(out_features, in_features)`.
        chunks: Number of equal parts of the outputs, each of which is filled up at its end.
    """
    rows, columns = shape
    weight = layer.weight.new_zeros(chunks, rows // chunks, columns)
    kept = layer.out_features // chunks
    weight[:, :kept, : layer.in_features] = layer.weight.detach().reshape(chunks, kept, layer.in_features)
    bias = None
    if layer.bias is not None:
        bias = layer.bias.new_zeros(chunks, rows // chunks)
        bias[:, :kept] = layer.bias.detach().reshape(chunks, kept)
        bias = bias.reshape(-1)
    return linear_like(layer, weight.reshape(rows, columns), bias)
