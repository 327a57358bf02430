"""Convolutions of patches that do not overlap, or of single pixels, seen as linear layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .linear_view import LinearView


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvolutionView(LinearView):
    """A convolution whose patches do not overlap: a linear map of each patch, or of single pixels.

    The values of a patch, `[channels, height, width]`, are the inputs of the linear layer, in this order, so that its
    weight is that of the convolution, reshaped. Pixels that make up no whole patch are left out, as the convolution does.

    Args:
        linear: The layer, `in_channels * prod(kernel_size)` inputs and `out_channels` outputs.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Sides of a patch, one for each dimension.
        stride: The same as `kernel_size`, or any steps between single pixels.
        device: Device of the empty weight.
        dtype: Data type of the empty weight.
    """

    def __init__(
        self,
        linear: nn.Module,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(linear, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride

    @staticmethod
    def kind(module: nn.Module) -> str | None:
        """See `LinearView.kind`."""
        # A subclass may compute something else.
        if type(module) not in _CONVOLUTIONS:
            return None
        conv = cast("nn.Conv2d", module)
        padding = (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
        if conv.groups != 1 or not isinstance(padding, tuple) or any(padding):
            return None
        if all(size == 1 for size in conv.kernel_size):
            return "pointwise_convolutions"
        is_dense = all(size == 1 for size in conv.dilation)
        return "patch_embedding" if conv.kernel_size == conv.stride and is_dense else None

    @classmethod
    def of(cls, module: nn.Module) -> ConvolutionView:
        """See `LinearView.of`."""
        conv = cast("nn.Conv2d", module)
        weight, bias = conv.weight, conv.bias
        rows = weight.detach().reshape(conv.out_channels, -1)
        linear = nn.Linear(rows.shape[1], conv.out_channels, bias is not None, "meta", weight.dtype)
        linear.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = bias
        sizes = conv.in_channels, conv.out_channels, tuple(conv.kernel_size), tuple(conv.stride)
        return cls(linear, *sizes, weight.device, weight.dtype).train(conv.training)

    def plain(self) -> nn.Module:
        """See `LinearView.plain`."""
        dense = cast("nn.Linear", self.linear)
        weight, bias = dense.weight, dense.bias
        kind = _CONVOLUTIONS[len(self.kernel_size) - 1]
        sizes = self.in_channels, self.out_channels, self.kernel_size, self.stride
        conv = kind(*sizes, bias=bias is not None, device="meta", dtype=weight.dtype)
        values = weight.detach().reshape(self.out_channels, self.in_channels, *self.kernel_size).contiguous()
        conv.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        if bias is not None:
            conv.bias = bias
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[batch, in_channels, …]` to `[batch, out_channels, …]`."""
        # Contiguous, as the output of a convolution: the model may look at it in another shape.
        return self.linear(self._patches(input)).movedim(-1, 1).contiguous()

    def _patches(self, input: Tensor) -> Tensor:
        """Return the values of the patches, `[batch, …, in_channels * prod(kernel_size)]`."""
        if all(size == 1 for size in self.kernel_size):
            for dim, step in enumerate(self.stride, start=2):
                if step > 1:
                    input = input[(slice(None),) * dim + (slice(None, None, step),)]
            # A product with what is not contiguous may be rounded otherwise where the weight is trainable.
            return input.movedim(1, -1).contiguous()
        count = len(self.kernel_size)
        for dim, size in enumerate(self.kernel_size):
            # Each side becomes two: patches, and pixels within a patch.
            whole = input.shape[2 + 2 * dim] // size
            input = input.narrow(2 + 2 * dim, 0, whole * size).unflatten(2 + 2 * dim, (whole, size))
        within = range(3, 3 + 2 * count, 2)
        return input.permute(0, *range(2, 2 + 2 * count, 2), 1, *within).flatten(1 + count)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
