"""Linear layers with fewer inputs or outputs than the original."""

from __future__ import annotations

from torch import Tensor, nn


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
