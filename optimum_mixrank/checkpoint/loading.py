"""Insert empty factored layers into a model whose weights are about to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import nn

from ..runtime.formatting import listed, quote, type_of
from ..runtime.logging import get_logger
from .modeling import FactoredLinear, LowRankLinear, replace_module
from .names import canonical_names
from .narrowing import mark_narrow
from .other_releases import under_present_names
from .pivoted import PivotedLinear
from .rank_map import FactoredLayer, decode_rows
from .shared import share
from .views import insert_views


logger = get_logger(__name__)


def insert_factored_layers(model: nn.Module, layers: Mapping[str, FactoredLayer]) -> dict[str, FactoredLayer]:
    """Replace every linear layer in the rank map by an empty factored layer on the meta device.

    All entries are checked before the first layer is replaced, since they may come from an untrusted file. A warning
    names the layers of the map that this model lacks, as when it is opened with fewer blocks.

    Returns:
        The rank map under the names that the layers have in this release of Transformers; see `other_releases`.

    Raises:
        ValueError: if the model has none of the map's layers, or if an entry names something other than a linear layer
            or does not fit its layer.
    """
    layers = under_present_names(model, layers)
    insert_views(model, layers)
    names = {canonical: name for name, canonical in canonical_names(model).items()}
    present = {canonical: layer for canonical, layer in layers.items() if canonical in names}
    missing = [canonical for canonical in layers if canonical not in names]
    if layers and not present:
        raise ValueError(
            f"None of the {len(layers)} factored layers of the checkpoint exists in {type(model).__name__}; the first "
            f"is {quote(missing[0])}. The checkpoint belongs to another architecture."
        )
    parents = {canonical.rpartition(".")[0] for canonical in names} - {""}
    renamed = [canonical for canonical in missing if canonical.rpartition(".")[0] in parents]
    if renamed:
        raise ValueError(
            f"{type(model).__name__} has the other layers of {quote(renamed[0].rpartition('.')[0])}, but not "
            f"{quote(renamed[0])}, which the checkpoint holds compressed. It belongs to another architecture, or "
            f"to a release of Transformers that divides the layers differently; open it under that one."
        )
    if missing:
        logger.warning(
            f"{len(missing)} factored layers of the checkpoint do not exist in this {type(model).__name__} and are "
            f"left out: {listed(missing)}."
        )
    linears: dict[str, nn.Linear] = {}
    for canonical in present:
        linear = model.get_submodule(names[canonical])
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"rank_map entry {canonical!r} names {type_of(linear)}, not a linear layer.")
        linears[canonical] = linear
    empty: dict[str, nn.Module] = {}
    for canonical, layer in present.items():
        if layer.members is None:
            _check_entry(canonical, layer, linears[canonical])
            empty[names[canonical]] = _marked(empty_layer(linears[canonical], layer), layer, linears[canonical])
        elif canonical == layer.members[0] or layer.members[0] not in present:
            shared = _empty_shared(layer, present, linears)
            empty.update({names[member]: module for member, module in shared.items()})
    places = _places(model)
    for name, module in empty.items():
        for place in places[id(model.get_submodule(name))]:
            replace_module(model, place, module)
    return layers


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of all places in which a model holds a module, by its identity: a head may have several."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def _empty_shared(
    layer: FactoredLayer, present: Mapping[str, FactoredLayer], linears: Mapping[str, nn.Linear]
) -> dict[str, nn.Module]:
    """Return empty layers that share a factor, by canonical name, after a check of their entries."""
    members = layer.members or ()
    lacking = [member for member in members if member not in present]
    if lacking:
        raise ValueError(
            f"{quote(lacking[0])}, whose first factor {quote(members[0])} shares, does not exist in this model. The "
            "checkpoint belongs to another architecture."
        )
    sizes, inputs = [], set()
    for member in members:
        entry, linear = present[member], linears[member]
        _check_shape(member, entry, linear)
        sizes.append(entry.shape[0] if entry.shape else linear.out_features)
        inputs.add(entry.shape[1] if entry.shape else linear.in_features)
    first = linears[members[0]]
    if len(inputs) > 1:
        raise ValueError(
            f"The layers {quote(list(members))} have different inputs and cannot share a factor. {_DAMAGED}"
        )
    joint = nn.Linear(inputs.pop(), sum(sizes), first.bias is not None, "meta", first.weight.dtype)
    whole = replace(layer, pivots=present[members[0]].pivots, members=None, shape=None, dense_shape=None, chunks=1)
    for member in members:
        if present[member].bias != (linears[member].bias is not None):
            _check_entry(member, replace(whole, rank=1, layout="factors", pivots=None), linears[member])
    _check_entry(members[0], whole, joint)
    parts = share(cast(FactoredLinear, empty_layer(joint, whole)), sizes, members)
    return {
        member: _marked(part, present[member], linears[member]) for member, part in zip(members, parts, strict=True)
    }


def _marked(module: nn.Module, layer: FactoredLayer, linear: nn.Linear) -> nn.Module:
    """Return an empty layer in the mode of the dense one, and frozen if its class freezes that."""
    if not linear.weight.requires_grad:
        module.requires_grad_(False)
    if layer.dense_shape is not None:
        mark_narrow(module, layer.dense_shape, layer.chunks)
    return module.train(linear.training)


_DAMAGED = "The checkpoint is damaged."


def _check_shape(canonical: str, layer: FactoredLayer, linear: nn.Linear) -> None:
    """Check that an entry was made for a layer of this shape."""
    if layer.dense_shape is not None and layer.dense_shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"rank_map entry {canonical!r} was made for a layer of shape {list(layer.dense_shape)}, but this one has "
            f"[{linear.out_features}, {linear.in_features}]. The checkpoint belongs to another architecture."
        )


def _check_entry(canonical: str, layer: FactoredLayer, linear: nn.Linear) -> None:
    """Check that an entry of a rank map fits the dense layer that it names."""
    _check_shape(canonical, layer, linear)
    m, n = layer.shape or (linear.out_features, linear.in_features)
    limit = min(n, m - (layer.layout == "pivoted"))
    shape = f"[{m}, {n}]"
    if layer.rank is not None and layer.rank > limit:
        raise ValueError(
            f"rank_map entry {canonical!r} has rank {quote(layer.rank)}, but the layer of shape {shape} allows {limit} at "
            "most. The checkpoint is damaged."
        )
    if layer.bias != (linear.bias is not None):
        raise ValueError(
            f"rank_map entry {canonical!r} has bias={layer.bias}, but the layer has "
            f"{'no' if linear.bias is None else 'a'} bias. The checkpoint is damaged, or was written under a release of "
            "Transformers that builds this layer differently; open it under that one."
        )
    if layer.layout == "pivoted" and layer.pivots is None:
        raise ValueError(
            f"rank_map entry {canonical!r} names no pivots, without which the outputs of a pivoted layer would be in the "
            "wrong order. The checkpoint is damaged; copy or download its config.json again."
        )
    # A digit stands for four rows; a mask much longer than the layer is not worth decoding.
    if layer.pivots is not None and len(layer.pivots) > m:
        raise ValueError(
            f"rank_map entry {canonical!r} has pivots of {len(layer.pivots):,} digits, more than the layer of shape "
            f"{shape} can have. The checkpoint is damaged."
        )


def empty_layer(linear: nn.Linear, layer: FactoredLayer) -> FactoredLinear | nn.Linear:
    """Return a layer on the meta device with the dtype of a dense one, and its shape unless the entry gives another."""
    m, n = layer.shape or (linear.out_features, linear.in_features)
    shape, dtype = (n, m), linear.weight.dtype
    if layer.rank is None:
        return nn.Linear(*shape, layer.bias, "meta", dtype)
    if layer.layout == "pivoted":
        pivots = None if layer.pivots is None else decode_rows(layer.pivots)
        return PivotedLinear(*shape, layer.rank, layer.bias, "meta", dtype, pivots)
    return LowRankLinear(*shape, layer.rank, layer.bias, "meta", dtype)
