"""Which layers are compressed, and what they are called.

Targets are found by structure, not by a list of classes: an encoder is a stack of blocks, and a stack is a
`nn.ModuleList`, or a `nn.Sequential` of blocks. Every linear layer of the base model inside such a stack is a target, if
the image reaches it; embeddings, poolers and heads are outside. What the image reaches is seen in one forward pass of the
part of the model that takes images: layers that are not called in it (those of a language model, or one whose weight is
used in another way), or whose inputs are the same for every image (Swin V2 computes its position biases with such
layers), are left out. Where the model does not run, nothing is guessed.

A layer has two names. Its *module name* is what the installed release of Transformers calls it in this model. Its
*canonical name* is what a checkpoint on disk calls it, relative to the base model:
`encoder.layer.0.attention.attention.query`. Transformers 5.x renames modules while loading and saving; canonical names
are the same in all releases and for all heads.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.entries import is_compressed
from ..checkpoint.names import Target, canonical_names
from ..checkpoint.patterns import is_end, matching
from ..checkpoint.views import view_class
from ..runtime.formatting import quote
from ..runtime.forward import activation_gradients, evaluation_mode
from ..runtime.hooks import hooks_removed_on_exit
from ..runtime.inputs import ModelInputs
from ..runtime.logging import get_logger
from ..runtime.outputs import PLAIN_CALL, ModelCall
from ..runtime.parts import WHOLE, text_model_refused
from ..runtime.stacks import is_stack
from .included import choose_included, layers_outside
from .plain_layers import check_model, check_targets, check_uses


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

Value = TypeVar("Value")


def encoder_linears(
    model: PreTrainedModel, call: ModelCall = PLAIN_CALL, include: Collection[str] = ()
) -> list[Target]:
    """Return all linear layers in the blocks of a model that images pass through, in forward order.

    Args:
        model: The model.
        call: How it is called, and the images that it is tried on once; see `ModelCall.bound`.
        include: Which layers beside those of the blocks are returned too; see `MixRankConfig`.

    Raises:
        ValueError: if the model has none, does not run on the images, or contains factored layers, adapters or quantized
            layers already.
    """
    linears = linears_in_blocks(model)
    outside = layers_outside(model, linears) if include else []
    reached = _reached(model, [*linears, *outside], call.bound(model))
    left = [target for target in linears if not reached.get(target.name, False)]
    _log_left_out([each for each in left if each.name in reached], "their inputs are the same for every image")
    _log_left_out([each for each in left if each.name not in reached], "they are not called when images are")
    found = [target for target in linears if reached.get(target.name, False)]
    if include:
        found = _in_order(model, [*found, *choose_included(model, outside, linears, reached, include)])
    tied = [*_tied_to_others(model, found), *_used_elsewhere(model, found)]
    _log_left_out(tied, "their weights are used elsewhere too")
    found = [target for target in found if target not in tied]
    if not found:
        raise ValueError(
            f"No image reaches any of the {len(linears)} linear layers in the blocks of this {type(model).__name__}. "
            "Compress its vision tower by itself, or name layers by target_modules."
        )
    return found


def _in_order(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    names = {target.name: target for target in targets}
    return [names[name] for name, _ in model.named_modules() if name in names]


def _tied_to_others(model: PreTrainedModel, linears: Sequence[Target]) -> list[Target]:
    """Return layers whose weight belongs to another kind of layer as well, such as a head outside of the blocks.

    A layer may have several names; two of the layers that share a weight are refused by `check_targets`.
    """
    own = {id(target.module) for target in linears}
    others = {
        id(parameter)
        for module in model.modules()
        if id(module) not in own
        for parameter in module.parameters(recurse=False)
    }
    return [target for target in linears if id(target.module.weight) in others]


def _used_elsewhere(model: PreTrainedModel, linears: Sequence[Target]) -> list[Target]:
    """Return layers that the model holds in a second place by design, or whose weight another layer there shares.

    That may be another stack, as for the heads of detectors, or the same block. A layer that is in two blocks of one stack
    is refused by `check_uses`, and layers of one stack that share a weight by `check_targets`.
    """
    places: dict[int, dict[str, int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places.setdefault(id(module.weight), {})[name] = id(module)

    def is_by_design(layers: dict[str, int]) -> bool:
        blocks = [re.match(r".*?\.\d+(?=\.|$)|", f"model.{name}")[0] for name in layers]  # type: ignore[index]
        stacks = {block.rpartition(".")[0] for block in blocks}
        twice_in_a_block = len(set(blocks)) < len(blocks) and len(set(layers.values())) == 1
        return len(layers) > 1 and (len(stacks) > 1 or twice_in_a_block)

    return [target for target in linears if is_by_design(places[id(target.module.weight)])]


def linears_in_blocks(model: PreTrainedModel) -> list[Target]:
    """Return all linear layers in the blocks of a model, whether images reach them or not, in the order of the modules.

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
    stacks = [module for module in model.base_model.modules() if is_stack(module)]
    inside = {id(linear) for stack in stacks for linear in stack.modules() if isinstance(linear, nn.Linear)}
    found = [
        Target(name, names[name], module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if not found:
        if (refused := text_model_refused(model)) is not None:
            raise ValueError(refused)
        convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        kind = f": it is a convolutional network ({convolutions} convolutions)" if convolutions > 1 else ""
        pixels = sum(view_class(module, ["pointwise_convolutions"]) is not None for module in model.modules())
        remedy = (
            f" Its {pixels} convolutions of single pixels can be compressed with include=['pointwise_convolutions']."
            if pixels
            else ""
        )
        raise ValueError(
            f"{type(model).__name__} has no linear layer inside a stack of blocks (`nn.ModuleList`), so there is no "
            f"encoder to compress{kind}. Encoders built like ViT, DeiT and Swin are supported.{remedy}"
        )
    return found


def _reached(model: PreTrainedModel, linears: Sequence[Target], call: ModelCall) -> dict[str, bool]:
    """Return whether the inputs of layers depend on the image, by the names of those that are called."""
    reached: dict[str, bool] = {}
    handles = []
    for target in linears:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = target.name) -> None:
            reached[name] = reached.get(name, False) or (bool(args) and args[0].requires_grad)

        handles.append(target.module.register_forward_pre_hook(hook))
    with hooks_removed_on_exit(handles), evaluation_mode(model), activation_gradients(model):
        call.run(model, call.example_for(model).requiring_gradients())
    if any(reached.values()):
        return reached
    # A model may block gradients.
    return _changing(model, linears, call)


def _changing(model: PreTrainedModel, linears: Sequence[Target], call: ModelCall) -> dict[str, bool]:
    """Return the same from how inputs change with the image."""
    example = call.example_for(model)
    generator = torch.Generator().manual_seed(0)
    noise = {
        # Added to the example, which may be such noise itself.
        name: each + torch.randn(each.shape, generator=generator).to(each) if each.is_floating_point() else each
        for name, each in example.items()
    }
    seen: list[dict[str, list[Tensor]]] = []
    for inputs in (example, ModelInputs(noise)):
        called: dict[str, list[Tensor]] = {}
        handles = [
            target.module.register_forward_pre_hook(
                lambda module, args, name=target.name: called.setdefault(name, []).extend(args[:1])  # noqa: B023
            )
            for target in linears
        ]
        with hooks_removed_on_exit(handles), evaluation_mode(model):
            call.run(model, inputs)
        seen.append(called)
    first, second = seen

    def changes(name: str) -> bool:
        pairs = list(zip(first[name], second.get(name, []), strict=False))
        return len(pairs) < len(first[name]) or not all(torch.equal(*pair) for pair in pairs)

    return {name: changes(name) for name in first}


_SHOWN = 5


def _log_left_out(targets: Sequence[Target], reason: str) -> None:
    if targets:
        names = sorted(target.name for target in targets)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        logger.info(f"Left out, since {reason}: {', '.join(names[:_SHOWN])}{more}.")


def find_targets(
    model: PreTrainedModel,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    call: ModelCall = PLAIN_CALL,
    include: Collection[str] = (),
) -> list[Target]:
    """Return the layers of a model that would be compressed; see `candidates` and `select_targets`.

    Args:
        model: The model.
        target_modules: As in `MixRankConfig`.
        exclude_modules: As in `MixRankConfig`.
        call: As for `encoder_linears`.
        include: As in `MixRankConfig`.
    """
    targets = select_targets(candidates(model, target_modules, call, include), target_modules, exclude_modules)
    check_uses(model, targets)
    return targets


def candidates(
    model: PreTrainedModel,
    target_modules: str | Sequence[str] | None = None,
    call: ModelCall = PLAIN_CALL,
    include: Collection[str] = (),
) -> list[Target]:
    """Return the layers that patterns select from: those that images reach, or all if a pattern matches others alone.

    A layer that images do not reach is a target only if it is asked for by a name that no reached layer has.

    Raises:
        ValueError: as `encoder_linears`, unless `target_modules` names layers.
    """
    if target_modules is None or target_modules == "all-linear":
        return encoder_linears(model, call, include)
    try:
        reached = encoder_linears(model, call, include)
    except ValueError:
        every = linears_in_blocks(model)
        _select(every, target_modules, "target_modules")
        return every
    try:
        _select(reached, target_modules, "target_modules")
    except ValueError:
        every = linears_in_blocks(model)
        try:
            _select(every, target_modules, "target_modules")
        except ValueError:
            return reached
        return every
    return reached


def bound_call(call: ModelCall, model: PreTrainedModel, targets: Sequence[Target], needed: bool = True) -> ModelCall:
    """Return the call of the part of a model that runs its targets.

    Args:
        call: How the model is called, and the images that it is tried on.
        model: The model.
        targets: The layers that are compressed.
        needed: Whether the model has to run.

    Raises:
        ValueError: if it has to, and no part of it runs on the images, or none that calls all targets.
    """
    try:
        bound = call.bound(model)
        wanted = {target.name for target in targets}
        missing = wanted - _reached(model, targets, bound).keys()
        if missing and set(example := bound.example_for(model)) != set(example.without_text()):
            whole = dataclasses.replace(bound, part=WHOLE, with_text=True)
            bound, missing = whole, wanted - _reached(model, targets, whole).keys()
    except ValueError:
        if needed:
            raise
        return call
    if missing and needed:
        raise ValueError(
            f"{len(missing)} targeted layers are not called for these inputs, the first is {min(missing)!r}. Leave them "
            "out with exclude_modules, or calibrate with batches of all inputs that the model takes, text included."
        )
    return bound


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
                f"{field} has the key {quote(key)}, which matches no targeted layer. {_examples(targets, key)}"
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
            raise ValueError(
                f"{field} has {quote(pattern)}, which matches no linear layer. {_examples(linears, pattern)}"
            )
        selected.update(target.name for target in matched)
    return [target for target in linears if target.name in selected]


def _names(targets: Sequence[Target]) -> list[str]:
    return list(dict.fromkeys(name for target in targets for name in (target.name, target.canonical_name)))


def _matching(targets: Sequence[Target], names: set[str]) -> list[Target]:
    return [target for target in targets if target.name in names or target.canonical_name in names]


def _examples(linears: Sequence[Target], wanted: str) -> str:
    """Return the names of the layers, and which of their parts the last part of a name resembles."""
    kinds = dict.fromkeys(re.sub(r"\d+", "*", target.canonical_name) for target in linears)
    parts = dict.fromkeys(part for kind in kinds for part in kind.split("."))
    near = difflib.get_close_matches(wanted.split(".")[-1], parts, n=1, cutoff=0.7)
    return f"Layers are called {', '.join(kinds)}.{f' Did you mean {near[0]!r}?' if near else ''}"
