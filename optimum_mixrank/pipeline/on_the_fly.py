"""Compress while loading: `from_pretrained(id, quantization_config=MixRankConfig(dataset=…))`, as with `GPTQConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.original import load_image_processor
from .compressor import MixRankCompressor


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress_loaded_model(model: PreTrainedModel, config: MixRankConfig) -> None:
    """Compress a model in place right after its dense weights were loaded.

    Args:
        model: Its image processor is loaded from its `name_or_path`.
        config: The configuration; `num_samples` images of its `dataset` are drawn with `seed`.

    Raises:
        ValueError: as `MixRankCompressor.compress`, or if the checkpoint has no image processor.
    """
    processor = load_image_processor(model.name_or_path, {})
    MixRankCompressor(model, processor).compress(config, config.dataset, inplace=True)
