"""What of a model takes images: the whole, its method for the features of images, or the tower in it.

A model for images and text runs on images and text alone; what images reach in it is what its `get_image_features` runs,
or else the tower that they go into.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .inputs import MAIN_NAMES, ModelInputs


WHOLE = ""
"""The part that is the model itself."""

FEATURES = ("get_image_features", "get_video_features", "get_audio_features")
"""The methods of models for images and text that give what the rest of the model sees of images, videos and sounds."""


def takes(function: Callable[..., Any] | nn.Module | None) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a model or of one of its methods, by name; none if there is no such method."""
    if function is None:
        return {}
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):
        return {}


def part_of(model: nn.Module, name: str) -> Callable[..., Any]:
    """Return the part of a model, to be called."""
    if name == WHOLE:
        return model
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last) if last in FEATURES else model.get_submodule(name)


def accepted_by(model: nn.Module, name: str) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a part; of a method that passes others on, those of the method that it calls too."""
    arguments = takes(part_of(model, name))
    if not is_features(name) or all(each.kind is not each.VAR_KEYWORD for each in arguments.values()):
        return arguments
    owner, _, method = name.rpartition(".")
    inner = [takes(getattr(module, method, None)) for module in model.get_submodule(owner).modules()]
    return {argument: each for found in reversed(inner) for argument, each in found.items()}


def is_features(name: str) -> bool:
    """Return whether a part is the method for the features of images, of the model or of one inside it."""
    return name.rpartition(".")[2] in FEATURES


def input_names(model: nn.Module) -> frozenset[str]:
    """Return the names of all inputs that a model or the part of it that takes images may take."""
    parts: list[Any] = [model, *(getattr(model, name, None) for name in FEATURES)]
    parts += [module for module in model.modules() if any(name in takes(module) for name in MAIN_NAMES)]
    return frozenset(name for part in parts for name in takes(part))


def text_model_refused(model: nn.Module) -> str | None:
    """Return why a text model cannot be compressed; None for a model that images or sounds go into."""
    if "input_ids" not in takes(model):
        return None
    if any(name in takes(module) for module in model.modules() for name in MAIN_NAMES):
        return None
    name = type(model).__name__
    return f"{name} is a text model: its main input is `input_ids`. Only what images go into can be compressed."


def possible_parts(model: nn.Module, inputs: ModelInputs) -> Iterator[str]:
    """Yield the parts of a model that may take such inputs by themselves, the most complete ones first."""
    yield WHOLE
    # The outermost modules come first.
    names = sorted(dict(model.named_modules()).items(), key=lambda item: item[0].count(".") if item[0] else -1)
    for name, module in names:
        methods = [each for each in FEATURES if inputs.main_name in takes(getattr(module, each, None))]
        if methods:
            # Retrievers such as ColPali hold a model for images and text that has the method; so does what that holds.
            yield from (f"{name}.{each}" if name else each for each in methods)
            break
    for name, module in names[1:]:
        if inputs.main_name in takes(module) and any(isinstance(each, nn.Linear) for each in module.modules()):
            yield name
