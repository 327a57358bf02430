"""The hook through which `from_pretrained` and `save_pretrained` know compressed checkpoints.

Transformers calls such a hook a quantizer. This one swaps the layers of the rank map for factored ones while the model
is still on the meta device; the ordinary loading code (shards, dtypes, device maps, offload) then fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.quantizers.base import HfQuantizer

from .configuration import MixRankConfig
from .rank_map import QUANT_METHOD


if TYPE_CHECKING:
    from transformers import PreTrainedModel


Compress = Callable[["PreTrainedModel", MixRankConfig], None]


class MixRankHfQuantizer(HfQuantizer):
    """Loads, saves and turns dense again models that `MixRankCompressor` has compressed."""

    # A dense checkpoint may be compressed while it is loaded.
    requires_calibration = False
    quantization_config: MixRankConfig

    compress: ClassVar[Compress]
    """Compresses, in place, a dense model that has just been loaded; set when the format is registered with Transformers,
    since a checkpoint knows nothing of how it was made."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to compress while loading without images, before any weight is read.

        Raises:
            ValueError: if the checkpoint to load is dense and the configuration names no dataset.
        """
        if not self.pre_quantized and self.quantization_config.dataset is None:
            raise ValueError(
                "`quantization_config=MixRankConfig(...)` was passed for a checkpoint that is not compressed, and "
                "compression needs calibration images. Name a folder of images or a dataset on the Hub in "
                "`MixRankConfig(dataset=...)`, or compress with "
                "`MixRankCompressor.from_pretrained(...).compress(config, calibration_dataset=...)`."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from .loading import insert_factored_layers

        insert_factored_layers(model, self.quantization_config.factored_layers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            type(self).compress(model, self.quantization_config)
            return model
        attach(model, self)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Turn the model, in place, into a dense one without any trace of compression; `model.dequantize()` calls this.

        Args:
            model: The compressed model.
            dtype: Precision of the result; default: the model's.
        """
        from .dense import replace_by_dense

        replace_by_dense(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Factors are ordinary tensors: they can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters: they can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """See `is_trainable`; `Trainer` asks for both."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` sees two ordinary linear layers."""
        return True


def attach(model: PreTrainedModel, quantizer: MixRankHfQuantizer) -> None:
    """Give a compressed model the attributes that a reloaded one has, whichever way it came to be.

    `is_quantized` stays False: with it Transformers forbids `.half()` and `.float()` and `Trainer` refuses, for the
    sake of integer weights. Factors are ordinary floating point numbers.
    """
    model.hf_quantizer = quantizer
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_is_quantized", False):
            config._is_quantized = False
