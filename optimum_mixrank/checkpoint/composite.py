"""A compressed model as a part of another: an encoder under a decoder, a vision tower, a backbone.

Loading looks for the rank map in the configuration of the whole, which knows nothing of how its parts were made. Before a
model is saved, its own configuration therefore gets the map of all factored layers that it holds, under the names that
they have in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .configuration import MixRankConfig
from .rank_map import QUANT_METHOD, FactoredLayer, layout_version, quantization_method


if TYPE_CHECKING:
    from transformers import PreTrainedModel


Attach = Callable[["PreTrainedModel", MixRankConfig], None]
"""Gives a model the attributes of a compressed one, with this configuration."""


def describe_factored_layers(model: PreTrainedModel, attach: Attach) -> None:
    """Make the configuration of a model name all factored layers that it holds, and no others.

    The maps of several compressed parts are merged; the other settings are those of the model itself, or else of its
    first compressed part, and `attach` gives the model the new configuration. A complete one is left as it is.
    """
    from .entries import compressed_layers, entry_of
    from .names import canonical_names

    _drop_dtypes(model)
    factored = compressed_layers(model)
    own = _settings(model.config)
    if not factored:
        if own is not None and own.rank_map:
            forget_compression(model)
        return
    names = canonical_names(model)
    entries = _under_names(model, {names[name]: entry_of(module) for name, module in factored.items()})
    known = {} if own is None else own.factored_layers
    # A part may have been replaced by another with layers of the same names.
    changed = {name for name, entry in entries.items() if known.get(name) != entry}
    if own is not None and not changed and known.keys() == entries.keys():
        return
    parts = (_settings(getattr(module, "config", None)) for module in model.modules())
    settings = own or next((each for each in parts if each is not None), MixRankConfig())
    stored = {} if own is None else own.rank_map
    rank_map = {name: entry.to_dict() if name in changed else stored[name] for name, entry in entries.items()}
    # A copy is not checked anew: a method that only another version knows is kept for the record.
    described = copy.copy(settings)
    described.rank_map = rank_map
    described.layout_version = layout_version(entries.values())
    attach(model, described)


def _under_names(model: PreTrainedModel, entries: Mapping[str, FactoredLayer]) -> dict[str, FactoredLayer]:
    """Return entries in which layers that share a factor name each other as this model, not one of its parts, does.

    Raises:
        ValueError: if some of the layers that share a factor have been replaced, so that its rows have no owner.
    """
    from .names import canonical_names
    from .shared import SharedLinear

    names = canonical_names(model)
    groups: dict[int, dict[int, str]] = {}
    sizes: dict[int, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, SharedLinear):
            groups.setdefault(id(module.holder), {})[module.position] = names[name]
            sizes[id(module.holder)] = len(module.members)
    found = dict(entries)
    for holder, group in groups.items():
        members = tuple(group[position] for position in sorted(group))
        if len(members) != sizes[holder]:
            raise ValueError(
                f"{', '.join(members)} shared a factor with layers that this {type(model).__name__} no longer holds, and "
                "cannot be saved without them. Make the model dense with `to_dense` before layers are replaced."
            )
        found.update({name: replace(entries[name], members=members) for name in members})
    return found


def forget_compression(model: PreTrainedModel) -> None:
    """Remove every trace of compression from a dense model and the configurations of its parts."""
    from .self_contained import forget_code
    from .stacking import stack_again

    stack_again(model)
    for each in model.modules():
        for name in ("hf_quantizer", "quantization_method"):
            # `hf_quantizer` is an attribute of every module that has been compressed or loaded by itself.
            if name in vars(each):
                delattr(each, name)
    for config in configurations(model):
        if _settings(config) is not None:
            del config.quantization_config
        forget_code(config)
    _drop_dtypes(model)
    model.is_quantized = False


def _drop_dtypes(model: PreTrainedModel) -> None:
    """Drop the dtype that Transformers 4.57 notes in the configurations of parts, and cannot save."""
    for config in configurations(model):
        vars(config).pop("_pre_quantization_dtype", None)


def configurations(model: PreTrainedModel) -> list[Any]:
    """Return the configurations of a model and its parts, each once."""
    own = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    return list({id(each): each for config in own for each in nested_configurations(config)}.values())


def nested_configurations(config: Any) -> list[Any]:
    """Return a configuration of Transformers and those inside it, each once, in the order of their fields."""
    found: dict[int, Any] = {}
    waiting = [config]
    while waiting:
        each = waiting.pop(0)
        if id(each) not in found and isinstance(each, _configuration_class()):
            found[id(each)] = each
            waiting += vars(each).values()
    return list(found.values())


def _configuration_class() -> type:
    from transformers import configuration_utils

    # The name has changed in Transformers 5.
    return getattr(configuration_utils, "PreTrainedConfig", None) or configuration_utils.PretrainedConfig


def _settings(config: Any) -> MixRankConfig | None:
    """Return the settings of a compression that a configuration of Transformers holds, parsed or as read from a file."""
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, Mapping) and quantization_method(stored) == QUANT_METHOD:
        return MixRankConfig.from_dict(dict(stored))
    return stored if isinstance(stored, MixRankConfig) else None
