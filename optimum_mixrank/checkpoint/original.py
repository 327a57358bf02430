"""Load the model that is to be compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..runtime.distributed import Processes
from ..runtime.logging import get_logger


logger = get_logger(__name__)


def open_original(
    model_or_path: str | Path | PreTrainedModel,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    default_device: torch.device | None,
    auto_class: Any,
    hub_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, Any]:
    """The model to compress, where it is to be, and the image processor of its checkpoint.

    Args:
        model_or_path: A local folder, a Hub id, or a model in memory, which is taken as it is.
        dtype: See `load_original`.
        device: Where to put the model.
        default_device: Where to put a checkpoint that has neither `device` nor `device_map`; None leaves it on the CPU.
        auto_class: See `load_original`.
        hub_kwargs: As for Transformers' `from_pretrained`.

    Raises:
        OSError: as `load_original`.
        TypeError: if Hub arguments are given for a model in memory.
        ValueError: as `load_original`, or if `device` is given for a model that has a `device_map`.
    """
    if isinstance(model_or_path, PreTrainedModel):
        if hub_kwargs or auto_class is not None:
            surplus = ", ".join([*hub_kwargs, *(["auto_class"] if auto_class is not None else [])])
            raise TypeError(f"A model in memory takes no {surplus}; they belong to a path or Hub id.")
        places = getattr(model_or_path, "hf_device_map", None) or {}
        device_map = places if len(set(places.values())) > 1 else None
    else:
        device_map = hub_kwargs.get("device_map")
    if device is not None and device_map is not None:
        raise ValueError(
            f"device={str(device)!r} and device_map={device_map!r} both say where the model lies; leave one out."
        )
    if isinstance(model_or_path, PreTrainedModel):
        model, image_processor = model_or_path, None
    else:
        model = load_original(model_or_path, dtype, auto_class, hub_kwargs)
        image_processor = load_image_processor(model_or_path, hub_kwargs)
        device = default_device if device_map is None and device is None else device
    return (model if device is None else model.to(device)), image_processor


def load_original(
    path: str | Path, dtype: str | torch.dtype, auto_class: Any, hub_kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load a dense checkpoint with the class that it names, so that its head is kept.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the dtype is unknown or the checkpoint is compressed already.
    """
    config = AutoConfig.from_pretrained(path, **hub_kwargs)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method")
        raise ValueError(
            f"{str(path)!r} is compressed or quantized already (quant_method={method!r}); start from the original "
            "checkpoint. Quantization is applied after compression, not before."
        )
    if auto_class is None:
        architectures = getattr(config, "architectures", None) or [None]
        auto_class = getattr(transformers, architectures[0] or "", AutoModel)
    return auto_class.from_pretrained(path, dtype=parse_dtype(dtype), **hub_kwargs)


def check_placement(model: PreTrainedModel, processes: Processes) -> None:
    """Check that all weights lie where they are computed with: on one device, or each on its own.

    Raises:
        ValueError: if weights are offloaded, or each of several processes was to use several devices.
    """
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} weights of this {type(model).__name__} are offloaded or were never loaded, the first is "
            f"{offloaded[0]!r}; compression needs all of them in memory. Load with dtype='bfloat16', give `device_map` "
            "more devices or a larger `max_memory`, or leave it out and compress on the CPU."
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 and not processes.is_single:
        raise ValueError(
            f"The model is spread over {', '.join(devices)} in each of {processes.count} processes. Use one process "
            "for a model on several devices, or leave `device_map` out, so that each process has one device."
        )


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype from its name; `"auto"` stays.

    Raises:
        ValueError: if it is no floating point dtype.
    """
    if dtype == "auto":
        return "auto"
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is no floating point dtype; choose 'float32', 'float16', 'bfloat16' or 'auto'."
        )
    return parsed


def load_image_processor(path: str | Path, hub_kwargs: dict[str, Any]) -> Any:
    """The image processor of a checkpoint; None, with a warning, where it has none."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(path, **hub_kwargs)
    except (OSError, ValueError) as error:
        logger.warning(
            f"{str(path)!r} has no usable image processor ({error}). Images cannot be prepared; pass "
            "`image_processor=…`, or calibrate with batches of `pixel_values`."
        )
        return None
