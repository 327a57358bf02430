"""Write a model for a runtime, with all that has to be beside it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..checkpoint.composite import nested_configurations
from ..checkpoint.plain_factors import to_plain_factors
from ..checkpoint.saving import writable_directory
from ..runtime.files import explained_no_space, flush_tree
from ..runtime.folders import can_be_renamed, remove_leftovers, resolved, staging_folder
from ..runtime.formatting import format_size
from ..runtime.forward import evaluation_mode
from ..runtime.logging import get_logger
from ..runtime.registry import RUNTIMES
from .image_part import image_part, image_shape, processed_shape
from .target import Runtime


logger = get_logger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        file: The model.
        runtime: The runtime that it is for.
        quantized: What has 8 bits, in words; None for a file in float32.
        num_bytes: Size of the model with all files that belong to it, without configurations.
    """

    file: Path
    runtime: str
    quantized: str | None
    num_bytes: int


def export_model(
    model: PreTrainedModel,
    output: str | Path,
    runtime: str = "onnx",
    *,
    int8: bool = False,
    calibration: Iterable[Tensor] | None = None,
    plain_factors: bool = False,
    image_processor: Any = None,
    pixel_values_shape: Sequence[int] | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a model, compressed or dense, to a folder for a runtime; it takes batches of any size.

    Of a model for images and text that is what it sees of images: `image_embeds` of CLIP, for example.

    The folder holds the model (`model.onnx`, `openvino_model.xml`, …) with files that belong to it, `config.json` without
    the compression, which the file no longer needs, and the configuration of the image processor.

    Args:
        model: The model, in float32 and on the CPU; it stays as it is.
        output: The folder, which is complete or not there in the end.
        runtime: `"onnx"`, `"openvino"`, `"executorch"` or `"torch"`.
        int8: Whether to store weights in 8 bits (`"onnx"` and `"openvino"`). Factored layers become plain factors in the
            basis that suits 8 bits best.
        calibration: Batches of images of the size that the file takes, `[batch, channels, height, width]`, to find ranges
            for 8-bit activations with. Without them ONNX Runtime determines the ranges in each call, and OpenVINO keeps
            activations in float32.
        plain_factors: Whether pivoted layers become plain factors, see `to_plain_factors`: somewhat faster, with `rank²`
            more values each. With `int8` they always do.
        image_processor: The image processor whose configuration is written beside the model.
        pixel_values_shape: Shape of the images, `(channels, height, width)`; default: as the configuration of the model
            says or, where it leaves the size open, as the image processor makes them.
        overwrite: Whether the folder may hold files; those of other names stay there.

    Raises:
        FileExistsError: if the folder holds files and may not be overwritten, or a checkpoint.
        ImportError: if the runtime is not installed.
        ValueError: for an unknown runtime, one without int8, calibration without int8, or a model that cannot be exported.
    """
    writer = checked_runtime(runtime, int8)
    if calibration is not None and not int8:
        raise ValueError("Images are for ranges of 8-bit activations; ask for int8 too, or leave them out.")
    _check_model(model)
    shape = image_shape(model, image_processor, pixel_values_shape)
    source = image_part(model, shape)
    calibration = None if calibration is None else _checked_images(calibration, shape)
    if image_processor is not None and pixel_values_shape is not None:
        _compare_sizes(image_processor, shape)
    destination = writable_directory(output, overwrite)
    _check_no_checkpoint(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if int8 or plain_factors:
        source = image_part(to_plain_factors(copy.deepcopy(model), rotated=int8), shape)
    inside = destination.is_dir() or not can_be_renamed(destination)
    remove_leftovers(destination)
    with explained_no_space(destination), staging_folder(destination, inside) as folder:
        try:
            quantized = _write(writer, source, shape, folder, int8, calibration)
            num_bytes = sum(file.stat().st_size for file in folder.iterdir())
            _write_configurations(model, image_processor, folder)
            flush_tree(folder)
            _move(folder, destination, writer.file_name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return ExportResult(resolved(output) / writer.file_name, runtime, quantized, num_bytes)


def checked_runtime(name: str, int8: bool = False) -> Runtime:
    """Return a runtime that can be written for here.

    Raises:
        ImportError: if it is not installed.
        ValueError: if it is unknown, or has no int8.
    """
    runtime = RUNTIMES.create(name)
    if int8 and type(runtime).quantize is Runtime.quantize:
        raise ValueError(f"runtime={name!r} has no int8 here; choose 'onnx' or 'openvino', or leave int8 out.")
    runtime.check_packages(["nncf"] if int8 and name == "openvino" else [])
    return runtime


def _check_model(model: PreTrainedModel) -> None:
    wrong = {f"{each.dtype} on {each.device.type}" for each in model.parameters() if each.is_floating_point()}
    wrong -= {"torch.float32 on cpu"}
    if wrong:
        raise ValueError(
            f"The model is in {', '.join(sorted(wrong))}; export it from torch.float32 on the CPU: load it with "
            "dtype='float32'."
        )


def _checked_images(batches: Iterable[Tensor], shape: Sequence[int]) -> Iterator[Tensor]:
    """Return batches of images, of which the first is checked before any work."""
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("There are no images for the ranges of 8-bit activations; the dataset is empty or used up.")
    if tuple(first.shape[1:]) != tuple(shape):
        found, expected = map(format_size, (first.shape[1:], shape))
        raise ValueError(
            f"The images for the ranges of 8-bit activations are {found}, but the file takes {expected}; set the size of "
            "the image processor to that."
        )
    return chain([first], remaining)


def _compare_sizes(image_processor: Any, shape: Sequence[int]) -> None:
    """Warn if the image processor that is written beside a model does not make images of the size that was asked for."""
    try:
        found = processed_shape(image_processor)
    except (AttributeError, KeyError, TypeError, ValueError):
        return  # it makes something else of images, such as patches
    if found != tuple(shape):
        logger.warning(
            f"The image processor makes images of {format_size(found)}, but the exported model takes "
            f"{format_size(shape)}; set its size before you use it with this file."
        )


def _check_no_checkpoint(folder: Path) -> None:
    """A checkpoint would lose its `config.json`, without which nothing can open it."""
    if not (folder / CONFIG_NAME).is_file():
        return
    for pattern in ("*.safetensors", "*.safetensors.index*.json", "pytorch_model*.bin"):
        weights = next(folder.glob(pattern), None)
        if weights is not None:
            raise FileExistsError(
                f"{str(folder)!r} holds a checkpoint ({weights.name}), whose {CONFIG_NAME} the exported model would "
                "replace; export to another folder."
            )


def _write(
    writer: Runtime,
    model: nn.Module,
    shape: Sequence[int],
    folder: Path,
    int8: bool,
    calibration: Iterable[Tensor] | None,
) -> str | None:
    """Write the model into a folder; return what was quantized."""
    generator = torch.Generator().manual_seed(0)
    # PyTorch takes a dimension of size one for a constant.
    pixel_values = torch.randn(2, *shape, generator=generator)
    file = folder / writer.file_name
    if not int8:
        with evaluation_mode(model):
            writer.write(model, pixel_values, file)
        return None
    full = folder / "float32"
    full.mkdir()
    with evaluation_mode(model):
        writer.write(model, pixel_values, full / writer.file_name)
    quantized = writer.quantize(full / writer.file_name, file, calibration)
    shutil.rmtree(full)
    return quantized


def _write_configurations(model: PreTrainedModel, image_processor: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    # The factors are products of their own in the file, which nothing else has to know.
    for part in nested_configurations(config):
        # The second is a dtype that Transformers 4.57 notes and cannot save.
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(part).pop(name, None)
    config.save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_pretrained(folder)


def _move(folder: Path, destination: Path, file_name: str) -> None:
    """Put files in their places; the weights that an earlier model of the same name had beside it are removed."""
    destination.mkdir(exist_ok=True)
    new = {file.name for file in folder.iterdir()}
    # `model.onnx.data`, for instance.
    old = {file for file in destination.iterdir() if file.is_file() and file.name.startswith(f"{file_name}.")}
    for file in folder.iterdir():
        os.replace(file, destination / file.name)
    for file in old:
        if file.name not in new and file.suffix in (".data", ".bin"):
            file.unlink(missing_ok=True)
