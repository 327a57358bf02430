"""Layers beside those of the blocks that the user includes: heads, poolers, projections, and convolutions as matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ..checkpoint.modeling import replace_module
from ..checkpoint.names import Target, canonical_names
from ..checkpoint.views import include_views, layers_in_views


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def included_as_linear(model: PreTrainedModel, include: Collection[str]) -> Iterator[None]:
    """Make the included convolutions of a model linear layers, and what is not compressed what it was, on exit.

    Args:
        model: Changed in place. Models that are copied from it meanwhile keep linear layers in the places of convolutions.
        include: As in `MixRankConfig`.
    """
    replaced = include_views(model, include) if include else {}
    done = False
    try:
        yield
        done = True
    finally:
        for name, module in replaced.items():
            view = model.get_submodule(name)
            is_dense = type(getattr(view, "linear", None)) is nn.Linear
            if not done or is_dense:
                replace_module(model, name, module)


def layers_outside(model: PreTrainedModel, inside: Sequence[Target]) -> list[Target]:
    """Return all linear layers that are not among those of the blocks, in the order of the modules."""
    known = {target.name for target in inside}
    names = canonical_names(model)
    return [
        Target(name, names[name], module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in known
    ]


def choose_included(
    model: PreTrainedModel,
    outside: Sequence[Target],
    inside: Sequence[Target],
    reached: Mapping[str, bool],
    include: Collection[str],
) -> list[Target]:
    """Return the layers beside those of the blocks that are included and that images reach.

    Args:
        model: The model.
        outside: See `layers_outside`.
        inside: The layers of the blocks.
        reached: Whether the inputs of layers depend on the image, by module name, in the order of their calls.
        include: As in `MixRankConfig`.
    """
    views = layers_in_views(model)
    own = {id(module) for module in model.base_model.modules()}
    order = {name: position for position, name in enumerate(reached)}
    first = min((order[target.name] for target in inside if target.name in order), default=len(order))

    def kind(target: Target) -> str:
        if order[target.name] < first:
            return "patch_embedding"
        *parents, last = target.canonical_name.split(".")
        if last == "proj" or last.endswith("projection") or any(part.endswith("projector") for part in parents):
            return "projections"
        return "pooling" if id(target.module) in own else "heads"

    return [
        target
        for target in outside
        if reached.get(target.name, False) and (target.name in views or kind(target) in include)
    ]


def without_views(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Return the layers that are not the linear maps of convolutions, which are decided by themselves."""
    views = layers_in_views(model)
    return [target for target in targets if target.name not in views]
