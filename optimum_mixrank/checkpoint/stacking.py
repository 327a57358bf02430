"""Layers that Transformers stacks as one matrix on disk, such as the two first layers of a SwiGLU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .modeling import GuardedLinear
from .names import saving_conversions


CONVERSIONS = "_weight_conversions"
"""The attribute in which Transformers keeps how a model was loaded, by which it is saved again."""


@contextmanager
def stored_apart(model: nn.Module) -> Iterator[None]:
    """Make Transformers save layers one by one if it would stack compressed ones with dense ones, or factors.

    The empty `weight` of a compressed layer, stacked with the matrix of a dense one, gives a matrix that cannot be divided
    again, and so do factors of different ranks. What is stored under the names of the single layers is loaded as it is.
    """
    layers = {name: isinstance(each, GuardedLinear) for name, each in model.named_modules() if _is_linear(each)}
    known = vars(model).get(CONVERSIONS)
    conversions = saving_conversions(model) if known is None and any(layers.values()) else known or []
    kept = [each for each in conversions if not _mixes(each, layers)]
    if len(kept) == len(conversions):
        yield
        return
    with saved_by(model, kept):
        yield


@contextmanager
def saved_by(model: nn.Module, conversions: Sequence[Any]) -> Iterator[None]:
    """Make Transformers save a model by these conversions, and by its own afterwards."""
    known = vars(model).get(CONVERSIONS)
    setattr(model, CONVERSIONS, conversions)
    try:
        yield
    finally:
        if known is None:
            delattr(model, CONVERSIONS)
        else:
            setattr(model, CONVERSIONS, known)


def stack_again(model: nn.Module) -> None:
    """Make Transformers save a model that is dense again as it saves other models of its class.

    Transformers saves in the way in which it has loaded, and the layers may have been stored apart.
    """
    known = vars(model).get(CONVERSIONS)
    if known is None:
        return
    stacked = {str(each.source_patterns) for each in known}
    lacking = [
        each for each in saving_conversions(model) if _is_stacking(each) and str(each.source_patterns) not in stacked
    ]
    if lacking:
        setattr(model, CONVERSIONS, [*known, *lacking])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | GuardedLinear)


def _mixes(conversion: Any, layers: dict[str, bool]) -> bool:
    """Return whether a conversion stacks compressed layers with dense ones, or the factors of compressed ones.

    Args:
        conversion: A conversion of Transformers.
        layers: For the name of each linear layer, whether it is compressed.
    """
    if not _is_stacking(conversion):
        return False
    stems = [re.sub(r"\.(weight|bias)$", "", pattern) for pattern in conversion.target_patterns]
    # A pattern without the name of a parameter stands for all of them.
    with_factors = stems == list(conversion.target_patterns)
    kinds: dict[str, set[bool]] = {}
    for name, compressed in layers.items():
        if any(re.search(rf"(^|\.){stem}$", name) for stem in stems):
            kinds.setdefault(name.rpartition(".")[0], set()).add(compressed)
    return any(len(each) > 1 or (with_factors and True in each) for each in kinds.values())


def _is_stacking(conversion: Any) -> bool:
    patterns = conversion.target_patterns
    return type(conversion).__name__ == "WeightConverter" and not isinstance(patterns, str) and len(patterns) > 1
