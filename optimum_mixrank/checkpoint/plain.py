"""Models with narrower MLPs that are ordinary models of a smaller configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..runtime.logging import get_logger
from .composite import configurations, forget_compression
from .entries import compressed_layers
from .narrowing import forget_narrow, narrow_from


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = get_logger(__name__)


def make_plain(model: PreTrainedModel) -> bool:
    """Make a model an ordinary one of a smaller configuration, whose checkpoint needs no plugin, where that is possible.

    It is possible if all compressed layers are dense ones with fewer units, and `intermediate_size` or `mlp_ratio` can
    say so: all blocks must have kept the same number of units, and the class of the model, built from the new
    configuration, must have exactly the present shapes.

    Args:
        model: Changed in place, but only if the result is True.

    Returns:
        Whether the model is an ordinary one now.
    """
    layers = list(compressed_layers(model).values())
    if not layers or not all(type(layer) is nn.Linear for layer in layers):
        return False
    units = _units(layers)
    if units is None or not any(_describes(model, *change) for change in _changes(model, units)):
        return False
    for layer in layers:
        forget_narrow(layer)
    forget_compression(model)
    return True


def _units(layers: list[nn.Module]) -> int | None:
    """Return how many hidden units every MLP has kept, or None if their numbers differ."""
    kept = set()
    for layer in layers:
        narrow = narrow_from(layer)
        assert narrow is not None and isinstance(layer, nn.Linear)  # as its callers have found
        (rows, _), chunks = narrow
        # The first layers of an MLP have lost outputs, the second one has lost inputs.
        kept.add(layer.out_features // chunks if layer.out_features < rows else layer.in_features)
    return kept.pop() if len(kept) == 1 else None


def _changes(model: PreTrainedModel, units: int) -> Iterator[tuple[Any, str, int | float]]:
    """Return configurations of the model and its parts, with a field of each and a value that might describe its MLPs."""
    for config in configurations(model):
        fields = config.to_dict()
        if isinstance(fields.get("intermediate_size"), int):
            yield config, "intermediate_size", units
        width = fields.get("hidden_size", fields.get("embed_dim"))
        if isinstance(fields.get("mlp_ratio"), int | float) and isinstance(width, int) and width > 0:
            if units % width == 0:
                yield config, "mlp_ratio", units // width
            # Classes round down, and those with a SwiGLU keep two thirds.
            yield config, "mlp_ratio", units / width
            yield config, "mlp_ratio", (units + 0.5) / width
            yield config, "mlp_ratio", 1.5 * units / width


def _describes(model: PreTrainedModel, config: Any, field: str, value: int | float) -> bool:
    """Change a field of a configuration if the class of the model then has the shapes of this one."""
    before = getattr(config, field)
    try:
        setattr(config, field, value)
        if _shapes_of(model.config, type(model)) == _shapes(model):
            return True
    except Exception as error:
        # Whatever stops the class from being built, this is no configuration for it.
        logger.debug(f"{type(model).__name__} cannot be built with {field}={value}: {error}")
    object.__setattr__(config, field, before)
    return False


def _shapes_of(config: Any, model_class: type[PreTrainedModel]) -> dict[str, torch.Size]:
    """Return the shapes of a model of this class as it would be made from the configuration's file."""
    fields = copy.deepcopy(config).to_dict()
    fields.pop("quantization_config", None)
    with torch.device("meta"):
        return _shapes(model_class(type(config).from_dict(fields)))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
