"""Which layers are compressed, and what they are called.

Targets are found by structure, not by a list of classes: an encoder is a stack of blocks, and a stack is a
`nn.ModuleList`. Every linear layer of the base model inside such a stack is a target; embeddings, poolers and heads are
outside. Layers whose inputs are the same for every image are left out: Swin V2 computes its position biases with such
layers. ViT, DeiT and Swin (with its patch merging) are covered, and so is any encoder with the same structure.

A layer has two names. Its *module name* is what the installed release of Transformers calls it in this model. Its
*canonical name* is what a checkpoint on disk calls it, relative to the base model:
`encoder.layer.0.attention.attention.query`. Transformers 5.x renames modules while loading and saving; canonical names
are the same in all releases and for all heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from ..checkpoint.entries import is_compressed
from ..checkpoint.names import Target, canonical_names
from ..checkpoint.patterns import is_end, matching
from ..runtime.formatting import quote
from ..runtime.forward import activation_gradients, black_image, evaluation_mode
from ..runtime.hooks import hooks_removed_on_exit
from ..runtime.logging import get_logger
from .plain_layers import check_model, check_targets, check_uses


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

Value = TypeVar("Value")


def encoder_linears(model: PreTrainedModel) -> list[Target]:
    """Return all linear layers of the model's encoder that images pass through, in forward order.

    The model runs once, on a black image.

    Raises:
        ValueError: if the model has none, or contains factored layers, adapters or quantized layers already.
    """
    if any(is_compressed(module) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is compressed already. Start from the original model, or return to a dense "
            "one first with `optimum_mixrank.to_dense(model)`."
        )
    check_model(model)
    names = canonical_names(model)
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(linear) for stack in stacks for linear in stack.modules() if isinstance(linear, nn.Linear)}
    found = [
        Target(name, names[name], module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer inside a stack of blocks (`nn.ModuleList`), so there is no "
            "encoder to compress. Encoders built like ViT, DeiT and Swin are supported."
        )
    constant = _constant_layers(model, found)
    if constant:
        logger.info(f"Left out, since their inputs are the same for every image: {', '.join(sorted(constant))}.")
    return [target for target in found if target.name not in constant]


def _constant_layers(model: PreTrainedModel, linears: Sequence[Target]) -> set[str]:
    """Return the names of layers whose inputs do not depend on the image."""
    reached: dict[str, bool] = {}
    handles = []
    for target in linears:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = target.name) -> None:
            reached[name] = reached.get(name, False) or args[0].requires_grad

        handles.append(target.module.register_forward_pre_hook(hook))
    try:
        with hooks_removed_on_exit(handles), evaluation_mode(model), activation_gradients(model):
            model(pixel_values=black_image(model).requires_grad_())
    except Exception as error:
        # Images of another size may pass, so this is no reason to refuse the model.
        _warn_unknown(model, f"it does not run on a black image ({type(error).__name__}: {error})")
        return set()
    if not any(reached.values()):
        _warn_unknown(model, "it blocks gradients")
        return set()
    return {name for name, depends in reached.items() if not depends}


def _warn_unknown(model: PreTrainedModel, reason: str) -> None:
    logger.warning(
        f"Which layers of this {type(model).__name__} see the image is unknown, because {reason}. All linear layers in its "
        "blocks are taken; leave out those whose inputs are the same for every image with exclude_modules."
    )


def find_targets(
    model: PreTrainedModel,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> list[Target]:
    """Return the layers of a model that would be compressed: `select_targets` of its `encoder_linears`."""
    targets = select_targets(encoder_linears(model), target_modules, exclude_modules)
    check_uses(model, targets)
    return targets


def select_targets(
    linears: Sequence[Target],
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> list[Target]:
    """Select the layers to compress: those that the patterns include and do not exclude; see `MixRankConfig`.

    Raises:
        ValueError: if a pattern matches nothing, or nothing is left; the message lists the existing names. Also if a
            layer is not an ordinary one; see `check_targets`.
    """
    included = _select(linears, target_modules, "target_modules") if target_modules is not None else linears
    excluded = _select(linears, exclude_modules, "exclude_modules") if exclude_modules is not None else []
    names = {target.name for target in excluded}
    remaining = [target for target in included if target.name not in names]
    if not remaining:
        raise ValueError(
            f"exclude_modules={quote(exclude_modules)} excludes all {len(included)} layers that "
            f"target_modules={quote(target_modules)} includes. Narrow it."
        )
    check_targets(remaining)
    return remaining


def match_values(targets: Sequence[Target], pattern: Mapping[str, Value], field: str) -> dict[str, Value]:
    """Return the values of `rank_pattern` or `ratio_pattern` by canonical name; the first matching key wins.

    As in PEFT, a key is the end of a name, or a regular expression for it.

    Raises:
        ValueError: if a key matches no layer.
    """
    values: dict[str, Value] = {}
    for key, value in pattern.items():
        matched = _matching(targets, matching(field, key, _names(targets), ends=True))
        if not matched:
            raise ValueError(
                f"{field} has the key {quote(key)}, which matches no targeted layer. {_examples(targets)}"
            )
        for target in matched:
            values.setdefault(target.canonical_name, value)
    return values


def _select(linears: Sequence[Target], patterns: str | Sequence[str], field: str) -> list[Target]:
    if patterns == "all-linear":
        return list(linears)
    selected: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # A single string is a regular expression for the whole name; in a list there are ends of names.
        if isinstance(patterns, str):
            names = matching(field, pattern, _names(linears))
        else:
            names = {name for name in _names(linears) if is_end(name, pattern)}
        matched = _matching(linears, names)
        if not matched:
            raise ValueError(f"{field} has {quote(pattern)}, which matches no linear layer. {_examples(linears)}")
        selected.update(target.name for target in matched)
    return [target for target in linears if target.name in selected]


def _names(targets: Sequence[Target]) -> list[str]:
    return list(dict.fromkeys(name for target in targets for name in (target.name, target.canonical_name)))


def _matching(targets: Sequence[Target], names: set[str]) -> list[Target]:
    return [target for target in targets if target.name in names or target.canonical_name in names]


def _examples(linears: Sequence[Target]) -> str:
    kinds = dict.fromkeys(re.sub(r"\d+", "*", target.canonical_name) for target in linears)
    return f"Layers are called {', '.join(kinds)}."
