"""Activation-aware mixed-rank compression of Vision Transformers for Hugging Face Transformers.

Importing this package is light (no torch, no Transformers model code) and registers the checkpoint format, so that
plain `AutoModel….from_pretrained` opens compressed checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._registration import install as _install_registration
from .version import __version__


_PUBLIC = {
    "FactoredLinear": "modeling",
    "LowRankLinear": "modeling",
    "PivotedLinear": "modeling",
    "MixRankCompressor": "compressor",
    "MixRankConfig": "configuration",
    "evaluate_model": "evaluation.evaluate",
    "find_targets": "targets",
    "load_image_dataset": "calibration.sources",
    "to_dense": "dense",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


if TYPE_CHECKING:
    from .calibration.sources import load_image_dataset
    from .compressor import MixRankCompressor
    from .configuration import MixRankConfig
    from .dense import to_dense
    from .evaluation.evaluate import evaluate_model
    from .modeling import FactoredLinear, LowRankLinear, PivotedLinear
    from .targets import find_targets


_install_registration()
