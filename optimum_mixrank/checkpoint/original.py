"""Load the model that is to be compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..runtime.distributed import Processes
from ..runtime.formatting import quote
from ..runtime.logging import get_logger
from .architecture import load_named, read_config
from .rank_map import quantization_method


logger = get_logger(__name__)


def open_original(
    model_or_path: str | Path | PreTrainedModel,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    default_device: torch.device | None,
    auto_class: Any,
    hub_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, Any]:
    """Return the model to compress, on its device, and the image processor of its checkpoint.

    Args:
        model_or_path: A local folder, a Hub id, or a model in memory, whose dtype stays as it is.
        dtype: Dtype to load a checkpoint in; `"auto"` is that of the checkpoint.
        device: Where to put the model.
        default_device: Where to put a checkpoint that has neither `device` nor `device_map`; None leaves it on the CPU.
        auto_class: Class to load a checkpoint with; None is the class that it names.
        hub_kwargs: Arguments of Transformers' `from_pretrained`.

    Raises:
        OSError: if there is no such checkpoint.
        TypeError: if `hub_kwargs` or `auto_class` are given for a model in memory, or `torch_dtype` for `dtype`.
        ValueError: if the dtype is unknown, the checkpoint is compressed already, or the model has both `device` and
            `device_map`.
    """
    if "torch_dtype" in hub_kwargs:
        # Transformers prefers `dtype`, which is always given below, and would ignore it.
        raise TypeError(f"torch_dtype={quote(hub_kwargs['torch_dtype'])} is an old name; pass `dtype` instead.")
    if "output_loading_info" in hub_kwargs:
        raise TypeError("output_loading_info makes no sense here, since only the model is returned; leave it out.")
    if isinstance(model_or_path, PreTrainedModel):
        surplus = [*hub_kwargs, *([] if auto_class is None else ["auto_class"])]
        if surplus:
            raise TypeError(f"A model in memory takes no {', '.join(surplus)}; they belong to a path or Hub id.")
        places = getattr(model_or_path, "hf_device_map", None) or {}
        device_map = places if len(set(places.values())) > 1 else None
    else:
        device_map = hub_kwargs.get("device_map")
    if device is not None and device_map is not None:
        raise ValueError(
            f"device={str(device)!r} and device_map={device_map!r} both say where to put the model; leave one out."
        )
    if isinstance(model_or_path, PreTrainedModel):
        model, image_processor = model_or_path, None
    else:
        model = _load_original(model_or_path, dtype, auto_class, hub_kwargs)
        image_processor = load_image_processor(model_or_path, hub_kwargs)
        device = default_device if device_map is None and device is None else device
    return (model if device is None else model.to(device)), image_processor


def _load_original(
    path: str | Path, dtype: str | torch.dtype, auto_class: Any, hub_kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load a dense checkpoint with the class that it names, so that its head is kept."""
    dtype = parse_dtype(dtype)
    config = read_config(path, hub_kwargs)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise ValueError(
            f"{str(path)!r} is compressed or quantized already (quant_method={quote(quantization_method(quantization))}); "
            "start from the original checkpoint. Quantization comes after compression, not before."
        )
    return load_named(path, config, auto_class, dtype=dtype, **hub_kwargs)


def check_placement(model: PreTrainedModel, processes: Processes) -> None:
    """Check that all weights are in memory, and on a single device if there are several processes.

    Raises:
        ValueError: if they are not.
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


_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What other tools call them."""


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a floating-point dtype by name; `"auto"` stays as it is.

    Raises:
        ValueError: for anything else.
    """
    if dtype == "auto":
        return "auto"
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        meant = _SHORT_DTYPES.get(dtype) if isinstance(dtype, str) else None
        hint = f"did you mean {meant!r}?" if meant else "choose 'float32', 'float16', 'bfloat16' or 'auto'."
        raise ValueError(f"dtype={dtype!r} is not a floating-point dtype; {hint}")
    return parsed


def load_image_processor(path: str | Path, hub_kwargs: dict[str, Any], *, needed: bool = True) -> Any:
    """Return the image processor of a checkpoint, or None, with a warning if it is needed, if it has none."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(path, **hub_kwargs)
    except (ImportError, OSError, ValueError) as error:
        # The first where it needs a library that is not installed.
        if needed:
            logger.warning(
                f"{str(path)!r} has no usable image processor ({error}). Images cannot be prepared; pass "
                "`image_processor=…`, or calibrate with batches of `pixel_values`."
            )
        return None
