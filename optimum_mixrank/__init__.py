"""Activation-aware mixed-rank compression of Vision Transformers for Hugging Face Transformers.

Importing this package is light (it imports neither torch nor Transformers) and registers the checkpoint format, so that
plain `AutoModel….from_pretrained` opens compressed checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .checkpoint.registration import install
from .runtime.version import __version__


_PUBLIC = {
    "FactoredLinear": "checkpoint.modeling",
    "LowRankLinear": "checkpoint.modeling",
    "PivotedLinear": "checkpoint.pivoted",
    "MixRankCompressor": "pipeline.compressor",
    "MixRankConfig": "checkpoint.configuration",
    "evaluate_model": "evaluation.evaluate",
    "export_model": "deployment.export",
    "find_targets": "calibration.targets",
    "load_image_dataset": "calibration.images.sources",
    "open_exported": "deployment.opening",
    "to_dense": "checkpoint.dense",
    "to_plain_factors": "checkpoint.plain_factors",
    "verify_model": "deployment.verify",
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
    from transformers import PreTrainedModel

    from .calibration.images.sources import load_image_dataset
    from .calibration.targets import find_targets
    from .checkpoint.configuration import MixRankConfig
    from .checkpoint.dense import to_dense
    from .checkpoint.modeling import FactoredLinear, LowRankLinear
    from .checkpoint.pivoted import PivotedLinear
    from .checkpoint.plain_factors import to_plain_factors
    from .deployment.export import export_model
    from .deployment.opening import open_exported
    from .deployment.verify import verify_model
    from .evaluation.evaluate import evaluate_model
    from .pipeline.compressor import MixRankCompressor


def _compress_loaded_model(model: PreTrainedModel, config: MixRankConfig) -> None:
    from .pipeline.on_the_fly import compress_loaded_model

    compress_loaded_model(model, config)


install(_compress_loaded_model)
