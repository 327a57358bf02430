"""What a model takes for one image: the measurements that a memory plan starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calibration.fisher import activation_gradients
from .compensation.segments import Call, find_segments
from .evaluation.flops import black_image
from .evaluation.memory import live_bytes, weight_bytes
from .hooks import removed_afterwards
from .inference import evaluation_mode
from .memory_plan import LayerSize, ModelSize
from .outputs import select_output
from .targets import Target


def probe_model(model: nn.Module, targets: Sequence[Target], with_gradients: bool) -> ModelSize:
    """Run a model on one black image, and once more with gradients where they will be needed.

    Args:
        model: A model that takes `pixel_values`.
        targets: The targeted layers.
        with_gradients: Whether gradients will be taken.

    Raises:
        ValueError: if the model's configuration names no size of images, or a layer is not called.
    """
    parameter = next(model.parameters())
    device = getattr(model, "device", parameter.device)
    image = black_image(model)
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.setdefault(name, (args[0], output))

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [listen(target.name) for target in targets]
    with removed_afterwards(handles), evaluation_mode(model):
        model(pixel_values=image)
        missing = [target.name for target in targets if target.name not in calls]
        if missing:
            raise ValueError(f"Layer {missing[0]!r} was not called; leave it out with exclude_modules.")
        leaders: dict[int, str] = {}
        layers = [
            LayerSize(name, target.shape, inputs[..., 0].numel(), leaders.setdefault(id(inputs), name))
            for target in sorted(targets, key=lambda target: list(calls).index(target.name))
            for name, (inputs, _) in [(target.name, calls[target.name])]
        ]
        boundary, outputs = _segments(model, image, layers, calls)
        calls.clear()
    with evaluation_mode(model):
        forward = live_bytes(model, lambda: model(pixel_values=image))
    backward = forward
    if with_gradients:
        with evaluation_mode(model), activation_gradients(model):
            backward = live_bytes(model, lambda: _gradients(model, image))
    return ModelSize(
        layers=layers,
        weights=weight_bytes(model),
        pixels=4 * image[0].numel(),
        forward=forward,
        backward=backward,
        boundary=boundary,
        outputs=outputs,
        on_host=device.type == "cpu",
    )


def _segments(
    model: nn.Module, image: Tensor, layers: Sequence[LayerSize], calls: dict[str, tuple[Tensor, Tensor]]
) -> tuple[int, int]:
    """Bytes of the largest input of a segment, and of the outputs of its layers; zeros for a model without segments."""
    try:
        segments = find_segments(model, [layer.name for layer in layers])
    except ValueError:
        return 0, 0
    boundaries: list[int] = []

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        boundaries.append(Call(args, kwargs).num_bytes)

    # A stage of Swin gives less than it gets.
    handles = [model.get_submodule(segment).register_forward_pre_hook(hook, with_kwargs=True) for segment in segments]
    with removed_afterwards(handles):
        model(pixel_values=image)
    outputs = [
        sum(
            output.numel() * output.element_size()
            for name, (_, output) in calls.items()
            if name.startswith(f"{segment}.")
        )
        for segment in segments
    ]
    return max(boundaries), max(outputs)


def _gradients(model: nn.Module, image: Tensor) -> None:
    """Run the model and back to the image."""
    found = select_output(model(pixel_values=image.clone().requires_grad_()), getattr(model, "config", None))
    tensors = [found.logits] if found.logits is not None else list(found.features)
    torch.stack([tensor.sum() for tensor in tensors]).sum().backward()
