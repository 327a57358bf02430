"""The class through which `from_pretrained` and `save_pretrained` handle compressed checkpoints.

Transformers calls such a class a quantizer. This one replaces the layers in the rank map by factored ones while the model
is still on the meta device; the ordinary loading code (shards, dtypes, device maps, offload) then fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.quantizers.base import HfQuantizer

from ..runtime.files import is_local_path
from .configuration import MixRankConfig
from .rank_map import QUANT_METHOD


if TYPE_CHECKING:
    from transformers import PreTrainedModel


Compress = Callable[["PreTrainedModel", MixRankConfig], None]


class MixRankHfQuantizer(HfQuantizer):
    """Loads and saves models that `MixRankCompressor` has compressed, and turns them back into dense ones."""

    # A dense checkpoint may be compressed while it is loaded.
    requires_calibration = False
    # Factors are ordinary floating-point parameters of ordinary linear layers.
    is_trainable = is_qat_trainable = is_compileable = True
    quantization_config: MixRankConfig

    _end_checks: Callable[[], None] | None = None

    compress: ClassVar[Compress]
    """Compresses, in place, a dense model that has just been loaded; set on registration, since it belongs elsewhere."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before any weight is read, to compress while loading without images.

        Raises:
            ValueError: if the checkpoint is dense and the configuration names no dataset.
        """
        if not self.pre_quantized and self.quantization_config.dataset is None:
            raise ValueError(
                "`quantization_config=MixRankConfig(...)` was passed for a checkpoint that is not compressed, and "
                "compression needs calibration images. Name a folder of images or a dataset on the Hub in "
                "`MixRankConfig(dataset=...)`, or compress with "
                "`MixRankCompressor.from_pretrained(...).compress(config, calibration_dataset=...)`."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from . import completeness
        from .loading import insert_factored_layers
        from .other_releases import read_renamed

        stored = self.quantization_config.factored_layers
        if not stored:
            return
        layers = insert_factored_layers(model, stored)
        if layers.keys() != stored.keys():
            self.quantization_config.rank_map = {name: layer.to_dict() for name, layer in layers.items()}
            read_renamed(model, stored, layers)
        completeness.refuse_missing_factors(model)
        if "checkpoint_files" in kwargs:
            completeness.check_stored_tensors(model, kwargs["checkpoint_files"] or [])
        else:
            # Transformers 4.57 tells the files to no one.
            self._end_checks = completeness.check_each_tensor(model)

    def update_unexpected_keys(self, model: PreTrainedModel, unexpected_keys: list[str]) -> list[str]:
        """Check what Transformers 4.57 has not found a place for."""
        from .completeness import check_unexpected_names

        if self.quantization_config.rank_map:
            check_unexpected_names(model, unexpected_keys)
        return unexpected_keys

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from .completeness import check_filled

        if self._end_checks is not None:
            self._end_checks()
            self._end_checks = None
        if self.pre_quantized:
            check_filled(model)
            attach(model, self)
        else:
            type(self).compress(model, self.quantization_config)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: Any = None, keep_widths: bool = False) -> PreTrainedModel:
        """Turn a model, in place, into a dense one without any trace of compression; `model.dequantize()` calls this.

        Args:
            model: The compressed model.
            dtype: Dtype of the result; default: that of the model.
            keep_widths: See `to_dense`.
        """
        from .composite import describe_factored_layers, forget_compression
        from .dense import dense_layers
        from .modeling import replace_module
        from .plain import make_plain
        from .views import remove_dense_views

        # All products before the first replacement, so that an error leaves the model as it was.
        for name, module in dense_layers(model, keep_widths).items():
            replace_module(model, name, module)
        remove_dense_views(model)
        if not keep_widths:
            forget_compression(model)
        elif not make_plain(model):
            describe_factored_layers(model, attach_configuration)
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the tensors to save, or None for those of `state_dict()`, and no metadata."""
        from .held_twice import state_of_every_place

        return state_of_every_place(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: factors are ordinary tensors."""
        return True


def attach(model: PreTrainedModel, quantizer: MixRankHfQuantizer) -> None:
    """Give a compressed model, whether loaded or made in memory, the attributes by which Transformers knows it.

    `is_quantized` stays False, because Transformers forbids `.half()`, `.float()` and training of quantized models, whose
    weights are integers. Factors are ordinary floating-point numbers.
    """
    from transformers.modeling_utils import PreTrainedModel

    from .save_pretrained import describe_on_saving

    describe_on_saving(PreTrainedModel, attach_configuration)
    model.hf_quantizer = quantizer
    model.quantization_method = QUANT_METHOD
    config = quantizer.quantization_config
    # Checkpoints are published, and must not show paths of the machine on which they were made.
    config.dataset = None if config.dataset is None or is_local_path(config.dataset) else config.dataset
    config.like = config.like if config.like is None or not is_local_path(config.like) else Path(config.like).name
    config.latency_table = None if config.latency_table is None else Path(config.latency_table).name
    model.config.quantization_config = config
    model.is_quantized = False
    for module in model.modules():
        settings = getattr(module, "config", None)
        if settings is not None and getattr(settings, "_is_quantized", False):
            settings._is_quantized = False


def attach_configuration(model: PreTrainedModel, config: MixRankConfig) -> None:
    """Do the same with a configuration."""
    attach(model, MixRankHfQuantizer(config, pre_quantized=True))
