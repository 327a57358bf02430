"""Modules that apply a linear map in another form, seen as linear layers.

A view takes the place of such a module, a convolution of single pixels for example, and computes the same by an `nn.Linear`
inside it. Whatever is done to linear layers can then be done to that one. It is stored under the name of the module with
`.linear` after it; the name of the module itself keeps an empty `weight`, for the reason that `Guarded` gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from .modeling import Guarded


INSIDE = "linear"
"""The name of the linear layer in a view."""


class LinearView(Guarded, ABC):
    """A module in place of another one that computes the same by a linear layer.

    Args:
        linear: The layer, dense or factored.
        device: Device of the empty weight.
        dtype: Data type of the empty weight.
    """

    is_linear_view = True
    linear: nn.Module

    def __init__(self, linear: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__(device, dtype)
        self.linear = linear

    @staticmethod
    @abstractmethod
    def kind(module: nn.Module) -> str | None:
        """Return the name in `MixRankConfig.include` that a module falls under; None if it has no such view."""

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> LinearView:
        """Return the view of a module, which shares its values."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """Return a module like the one that the view was made of, with the values of the dense layer inside."""
