"""Compress while loading: `from_pretrained(id, quantization_config=MixRankConfig(dataset=…))`, as with `GPTQConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.configuration import MixRankConfig


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress_loaded_model(model: PreTrainedModel, config: MixRankConfig) -> None:
    """Compress, in place, a model whose dense weights have just been loaded.

    Args:
        model: Its `name_or_path` says where its image processor is.
        config: With `dataset`; `num_samples` images of it are drawn with `seed`.

    Raises:
        ValueError: as `MixRankCompressor.compress`, or if the checkpoint has no image processor.
    """
    from ..checkpoint.original import load_image_processor
    from .compressor import MixRankCompressor

    processor = load_image_processor(model.name_or_path, {})
    MixRankCompressor(model, processor).compress(config, config.dataset, inplace=True)
