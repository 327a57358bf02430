"""Insert empty factored layers into a model whose weights are about to be loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..runtime.formatting import quote, shorten
from ..runtime.logging import get_logger
from .modeling import FactoredLinear, LowRankLinear, replace_module
from .names import canonical_names
from .pivoted import PivotedLinear
from .rank_map import FactoredLayer, decode_rows


logger = get_logger(__name__)


def insert_factored_layers(model: nn.Module, layers: Mapping[str, FactoredLayer]) -> None:
    """Replace every linear layer in the rank map by an empty factored layer on the meta device.

    All entries are checked before the first layer is replaced, since they may come from an untrusted file. A warning
    names the layers of the map that this model lacks, as when it is opened with fewer blocks.

    Raises:
        ValueError: if the model has none of the map's layers, or if an entry names something other than a linear layer
            or does not fit its layer.
    """
    names = {canonical: name for name, canonical in canonical_names(model).items()}
    present = {canonical: layer for canonical, layer in layers.items() if canonical in names}
    missing = [canonical for canonical in layers if canonical not in names]
    if layers and not present:
        raise ValueError(
            f"None of the {len(layers)} factored layers of the checkpoint exists in {type(model).__name__}; the first "
            f"is {quote(missing[0])}. The checkpoint belongs to another architecture."
        )
    if missing:
        logger.warning(
            f"{len(missing)} factored layers of the checkpoint do not exist in this {type(model).__name__} and are "
            f"left out: {', '.join(map(shorten, missing[:5]))}{', …' if len(missing) > 5 else ''}."
        )
    empty = {}
    for canonical, layer in present.items():
        linear = model.get_submodule(names[canonical])
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"rank_map entry {canonical!r} names a {type(linear).__name__}, not a linear layer.")
        _check_entry(canonical, layer, linear)
        empty[names[canonical]] = empty_layer(linear, layer).train(linear.training)
    for name, module in empty.items():
        replace_module(model, name, module)


def _check_entry(canonical: str, layer: FactoredLayer, linear: nn.Linear) -> None:
    """Check that an entry of a rank map fits the dense layer that it names."""
    limit = min(linear.in_features, linear.out_features - (layer.layout == "pivoted"))
    shape = f"[{linear.out_features}, {linear.in_features}]"
    if layer.rank > limit:
        raise ValueError(
            f"rank_map entry {canonical!r} has rank {quote(layer.rank)}, but the layer of shape {shape} allows {limit} at "
            "most. The checkpoint is damaged."
        )
    if layer.bias != (linear.bias is not None):
        raise ValueError(
            f"rank_map entry {canonical!r} has bias={layer.bias}, but the layer has "
            f"{'no' if linear.bias is None else 'a'} bias. The checkpoint is damaged."
        )
    if layer.layout == "pivoted" and layer.pivots is None:
        raise ValueError(
            f"rank_map entry {canonical!r} names no pivots, without which the outputs of a pivoted layer would be in the "
            "wrong order. The checkpoint is damaged; copy or download its config.json again."
        )
    # A digit stands for four rows; a mask much longer than the layer is not worth decoding.
    if layer.pivots is not None and len(layer.pivots) > linear.out_features:
        raise ValueError(
            f"rank_map entry {canonical!r} has pivots of {len(layer.pivots):,} digits, more than the layer of shape "
            f"{shape} can have. The checkpoint is damaged."
        )


def empty_layer(linear: nn.Linear, layer: FactoredLayer) -> FactoredLinear:
    """Return a factored layer on the meta device with the shape and dtype of a dense one."""
    shape, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    if layer.layout == "pivoted":
        pivots = None if layer.pivots is None else decode_rows(layer.pivots)
        return PivotedLinear(*shape, layer.rank, layer.bias, "meta", dtype, pivots)
    return LowRankLinear(*shape, layer.rank, layer.bias, "meta", dtype)
