"""Insert empty factored layers into a model whose weights are about to be loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..runtime.logging import get_logger
from .modeling import FactoredLinear, LowRankLinear, replace_module
from .names import canonical_names
from .pivoted import PivotedLinear
from .rank_map import FactoredLayer, decode_rows


logger = get_logger(__name__)


def insert_factored_layers(model: nn.Module, layers: Mapping[str, FactoredLayer]) -> None:
    """Replace every linear layer in the rank map by an empty factored layer on the meta device.

    A warning names the layers of the map that this model lacks, as when it is opened with fewer blocks.

    Raises:
        ValueError: if the model has none of the map's layers, if an entry names something other than a linear layer, or
            if a rank is too large for its layer.
    """
    names = {canonical: name for name, canonical in canonical_names(model).items()}
    missing = [canonical for canonical in layers if canonical not in names]
    if layers and len(missing) == len(layers):
        raise ValueError(
            f"None of the {len(layers)} factored layers of the checkpoint exists in {type(model).__name__}; the first "
            f"is {missing[0]!r}. The checkpoint belongs to another architecture."
        )
    if missing:
        logger.warning(
            f"{len(missing)} factored layers of the checkpoint do not exist in this {type(model).__name__} and are "
            f"left out: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}."
        )
    for canonical, layer in layers.items():
        if canonical in missing:
            continue
        linear = model.get_submodule(names[canonical])
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"rank_map entry {canonical!r} names a {type(linear).__name__}, not a linear layer.")
        limit = min(linear.in_features, linear.out_features - (layer.layout == "pivoted"))
        if layer.rank > limit:
            raise ValueError(
                f"rank_map entry {canonical!r} has rank {layer.rank}, but the layer of shape "
                f"[{linear.out_features}, {linear.in_features}] allows {limit} at most. The checkpoint is damaged."
            )
        replace_module(model, names[canonical], empty_layer(linear, layer).train(linear.training))


def empty_layer(linear: nn.Linear, layer: FactoredLayer) -> FactoredLinear:
    """Return a factored layer on the meta device with the shape and dtype of a dense one."""
    shape, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    if layer.layout == "pivoted":
        pivots = None if layer.pivots is None else decode_rows(layer.pivots)
        return PivotedLinear(*shape, layer.rank, layer.bias, "meta", dtype, pivots)
    return LowRankLinear(*shape, layer.rank, layer.bias, "meta", dtype)
