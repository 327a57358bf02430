"""Forward passes that leave the model as it was, and the image to run them on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients; on exit every module is back in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients; on exit all are as trainable as before."""
    trainable = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def activation_gradients(model: nn.Module) -> Iterator[None]:
    """Compute gradients with respect to activations but not parameters, which are as trainable on exit as before."""
    with frozen_parameters(model), torch.enable_grad():
        yield


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Compute as outside of `torch.inference_mode()` and with the CPU as default device, whatever the caller has set.

    Gradients are needed where the caller needs none, and tensors are made beside those of the model, on the CPU.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            # Precision is chosen by the accelerator.
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def fixed_random_state(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers on every entry, on the CPU and on a device; the caller's come back on exit."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Return the device of a model's inputs, and the dtype of those that are floating-point numbers."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    # Parameters that are offloaded to disk are on the meta device; Accelerate then moves the input itself.
    device = next((parameter.device for parameter in parameters if not parameter.is_meta), torch.device("cpu"))
    return device, parameters[0].dtype if parameters else None


@contextmanager
def image_size_explained(model: nn.Module, pixel_values: torch.Tensor) -> Iterator[None]:
    """Make a model's error about images of another size than that of its configuration say what to do.

    Raises:
        ValueError: instead of such an error.
    """
    try:
        yield
    except (ValueError, AssertionError, RuntimeError) as error:
        try:
            expected = configured_shape(model)[1:]
        except ValueError:
            raise error from None
        if pixel_values.ndim != 4:
            raise
        found = tuple(pixel_values.shape[-2:])
        # Some models take images of any size, and then fail for other reasons.
        if found == expected or not re.search("size|shape", str(error)):
            raise
        raise ValueError(
            f"The images have {found[0]} × {found[1]} pixels, but the model takes {expected[0]} × {expected[1]}, the "
            f"image_size of its configuration; set `size` and `crop_size` of the image processor to that, or pass "
            f"interpolate_pos_encoding=True if the model has this argument. ({error})"
        ) from error


def black_image(model: nn.Module, pixel_values_shape: Sequence[int] | None = None) -> torch.Tensor:
    """Return an image of zeros, `[1, channels, height, width]`, on the model's device and in its dtype.

    The shape `(channels, height, width)` defaults to `configured_shape`.

    Raises:
        ValueError: if the shape is malformed, or None and not configured.
    """
    shape = configured_shape(model) if pixel_values_shape is None else pixel_values_shape
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"pixel_values_shape={sizes or shape} is not (channels, height, width).")
    device, dtype = placement(model)
    return torch.zeros(1, *sizes, device=device, dtype=dtype)


def configured_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of an image according to the model's configuration, `(channels, height, width)`.

    Raises:
        ValueError: if the configuration does not give it.
    """
    config = getattr(model, "config", None)
    if (described := _shape_by_timm(model)) is not None:
        return described
    sizes = [(each, getattr(each, "image_size", None)) for each in _vision_configurations(config)]
    for each, size in sizes:
        pair = (size, size) if isinstance(size, int) else size
        if (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(side, int) and side > 0 for side in pair)
        ):
            return getattr(each, "num_channels", 3), *pair
    raise ValueError(
        f"The configuration of {type(model).__name__} has image_size={sizes[0][1]!r}, which is not an "
        "image size; set `model.config.image_size` to the number of pixels on each side."
    )


def configured_channels(model: nn.Module) -> int:
    """Return the number of channels of an image according to the model's configuration, by default 3."""
    try:
        return configured_shape(model)[0]
    except ValueError:
        return getattr(getattr(model, "config", None), "num_channels", 3)


def _shape_by_timm(model: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of an image for a model of timm; None for others, and where none is named.

    The arguments of its constructor come first, then what is said of its weights: in the checkpoint, or else in timm.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "timm_wrapper":
        return None
    arguments = getattr(config, "model_args", None) or {}
    sources = [getattr(each, "pretrained_cfg", None) or {} for each in (config, getattr(model, "timm_model", None))]
    stored = next((size for each in sources if (size := each.get("input_size"))), None)
    shape = [*stored] if isinstance(stored, list | tuple) and len(stored) == 3 else [3, None, None]
    size = arguments.get("img_size")
    if size is not None:
        shape[1:] = [size, size] if isinstance(size, int) else [*size]
    shape[0] = arguments.get("in_chans", shape[0])
    sizes = tuple(each for each in shape if isinstance(each, int))
    return sizes if len(sizes) == len(shape) == 3 else None


def _vision_configurations(config: object) -> list[object]:
    """Return a configuration, followed by those of its parts that images go into."""
    names = ("backbone_config", "vision_config", "encoder")
    return [config, *(part for name in names if (part := getattr(config, name, None)) is not None)]


_MAX_TOKENS = 256
"""Plain attention was faster with 64 and with 196 tokens."""


@contextmanager
def fast_attention_for_training(*models: nn.Module) -> Iterator[None]:
    """Use plain matrix products instead of fused attention on the CPU if images have few tokens; undone on exit.

    The CPU's fused kernel is optimised for the forward pass: with few tokens and in bfloat16 its backward pass takes
    longer than all linear layers together. Plain products keep `tokens²` values per head and layer.
    """
    fused = [model for model in models if _has_slow_attention(model)]
    try:
        for model in fused:
            model.set_attn_implementation("eager")
        yield
    finally:
        for model in fused:
            model.set_attn_implementation("sdpa")


def _has_slow_attention(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
        and isinstance(image, int)
        and isinstance(patch, int)
        and (image // patch) ** 2 <= _MAX_TOKENS
        and getattr(model, "_can_set_attn_implementation", lambda: False)()
    )
