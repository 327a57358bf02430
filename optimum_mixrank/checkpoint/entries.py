"""Which layers of a model are compressed, and their entries in the rank map."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .modeling import FactoredLinear
from .narrowing import narrow_from
from .rank_map import DENSE, FactoredLayer
from .shared import SharedLinear


def is_compressed(module: nn.Module) -> bool:
    """Return whether a layer is factored, shares a factor, or has lost units."""
    return isinstance(module, FactoredLinear | SharedLinear) or narrow_from(module) is not None


def entry_of(module: nn.Module) -> FactoredLayer:
    """Return the entry in the rank map of a compressed layer."""
    if isinstance(module, FactoredLinear | SharedLinear):
        entry = module.entry
    else:
        entry = FactoredLayer(None, module.bias is not None, DENSE)
    narrow = narrow_from(module)
    if narrow is None:
        return entry
    dense_shape, chunks = narrow
    return replace(entry, shape=(module.out_features, module.in_features), dense_shape=dense_shape, chunks=chunks)


def compressed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the compressed layers of a model by module name; of those that share a factor each by itself."""
    joints = {id(module.factored) for module in model.modules() if isinstance(module, SharedLinear)}
    return {
        name: module for name, module in model.named_modules() if is_compressed(module) and id(module) not in joints
    }
