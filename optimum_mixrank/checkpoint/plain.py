"""Narrow dense models that an ordinary configuration describes, so that their checkpoints need no plugin."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .composite import configurations, forget_compression, nested_configurations
from .entries import compressed_layers
from .narrowing import forget_narrow, narrow_from
from .self_contained import forget_code


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_plain(model: PreTrainedModel) -> bool:
    """Make a compressed model an ordinary one if another `intermediate_size` or `mlp_ratio` describes it.

    That is the case if its only compressed layers are dense ones with fewer units, and all MLPs have lost the same share of
    them. The model's class is built without weights from the changed configuration, and every shape compared.

    Args:
        model: Its configuration is changed in place; its weights stay as they are.

    Returns:
        Whether the model is an ordinary one now. If not, it is left as it was.
    """
    setting = _plain_setting(model)
    if setting is None:
        return False
    layers = compressed_layers(model)
    setattr(*setting)
    for layer in layers.values():
        forget_narrow(layer)
    forget_compression(model)
    return True


@contextmanager
def saved_plainly(model: PreTrainedModel) -> Iterator[bool]:
    """Let the configuration of a compressed model be an ordinary one, if there is one, while the model is saved.

    Yields:
        Whether there is one. The model itself stays a compressed one.
    """
    setting = _plain_setting(model)
    if setting is None:
        yield False
        return
    before = [(config, dict(vars(config))) for config in configurations(model)]
    setattr(*setting)
    for config, _ in before:
        vars(config).pop("quantization_config", None)
        forget_code(config)
    try:
        yield True
    finally:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)


def _plain_setting(model: PreTrainedModel) -> tuple[Any, str, Any] | None:
    """Return the configuration, the name of its field and the value that describe the widths of a compressed model."""
    layers = compressed_layers(model)
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        return None
    expected = _shapes(model)
    for position, name, value in _candidates(model, layers.values()):
        if _shapes_with(model, position, name, value) == expected:
            return nested_configurations(model.config)[position], name, value
    return None


def _candidates(model: PreTrainedModel, layers: Iterable[nn.Module]) -> Iterator[tuple[int, str, Any]]:
    """Yield settings that may describe the widths: position of the configuration, name of its field and value."""
    pairs = set()
    for layer in layers:
        narrow = narrow_from(layer)
        assert narrow is not None and isinstance(layer, nn.Linear)  # as `make_plain` has checked
        present = (layer.out_features, layer.in_features)
        pairs |= {(now, before) for now, before in zip(present, narrow[0], strict=True) if now != before}
    for position, config in enumerate(nested_configurations(model.config)):
        size, ratio = (getattr(config, name, None) for name in ("intermediate_size", "mlp_ratio"))
        for now, before in sorted(pairs):
            if isinstance(size, int):
                yield position, "intermediate_size", now
            if isinstance(ratio, int | float):
                yield from ((position, "mlp_ratio", each) for each in _ratios(ratio, now, before))


def _ratios(ratio: float, now: int, before: int) -> Iterator[float]:
    """Yield ratios that, multiplied by the width of the model and rounded down, may give `now` units, not `before`."""
    value = ratio * now / before
    if isinstance(ratio, int):
        # DINOv2 and others accept only whole numbers under Transformers 5, which is to open what 4.57 has written.
        if round(value) > 0 and math.isclose(value, round(value)):
            yield round(value)
        return
    yield from (value, math.nextafter(value, math.inf))


def _shapes_with(model: PreTrainedModel, position: int, name: str, value: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a model of this class with a changed configuration; None if it cannot be built."""
    config = copy.deepcopy(model.config)
    try:
        setattr(nested_configurations(config)[position], name, value)
        with torch.device("meta"):
            return _shapes(type(model)(config))
    except Exception:
        # Whatever a class objects to in a configuration that was only tried: the model stays a compressed one.
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
