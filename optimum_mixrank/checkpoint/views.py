"""Put views in the places of modules that are linear maps in another form, and modules back in theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

from .convolution_view import ConvolutionView
from .linear_view import INSIDE, LinearView
from .modeling import replace_module
from .names import canonical_naming


VIEWS: tuple[type[LinearView], ...] = (ConvolutionView,)
"""All kinds of views; another one is a class in a file of its own, and an entry here."""


def view_class(module: nn.Module, include: Collection[str] | None = None) -> type[LinearView] | None:
    """Return the class of the view that can take the place of a module; None if there is none, or it is not included."""
    for view in VIEWS:
        kind = view.kind(module)
        if kind is not None and (include is None or kind in include):
            return view
    return None


def include_views(model: nn.Module, include: Collection[str]) -> dict[str, nn.Module]:
    """Put views in the places of all modules of some kinds.

    Args:
        model: Changed in place; its values stay where they are.
        include: As in `MixRankConfig`.

    Returns:
        The modules that were replaced, by name.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        view = view_class(module, include)
        # A module in two places would become two views with values of their own.
        if view is not None and places[id(module)] == 1:
            found[name] = module
            replace_module(model, name, view.of(module))
    return found


def insert_views(model: nn.Module, layers: Collection[str]) -> None:
    """Put views in the places of the modules whose linear layer inside is among some layers, by canonical name."""
    if not any(name.endswith(f".{INSIDE}") for name in layers):
        return
    canonical = canonical_naming(model)
    for name, module in list(model.named_modules()):
        view = view_class(module)
        if view is not None and canonical(f"{name}.{INSIDE}") in layers:
            replace_module(model, name, view.of(module))


def remove_dense_views(model: nn.Module) -> None:
    """Put ordinary modules in the places of views whose layer is dense, with its values."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearView) and type(module.linear) is nn.Linear:
            replace_module(model, name, module.plain())


def layers_in_views(model: nn.Module) -> set[str]:
    """Return the names of the linear layers inside views."""
    return {f"{name}.{INSIDE}" for name, module in model.named_modules() if isinstance(module, LinearView)}
