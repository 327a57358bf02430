"""How much memory a model takes for one image: the measurements behind a memory estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoint.names import Target
from ..compensation.segments import Call, find_segments
from ..evaluation.memory import live_bytes, weight_bytes
from ..runtime.forward import activation_gradients, evaluation_mode, placement
from ..runtime.hooks import hooks_removed_on_exit
from ..runtime.inputs import ModelInputs
from ..runtime.outputs import PLAIN_CALL, ModelCall
from ..runtime.stacks import blocks_around


@dataclass(frozen=True)
class LayerSize:
    """A targeted layer.

    Attributes:
        name: Module name.
        shape: `(out_features, in_features)`.
        tokens: Number of vectors that it maps for one image.
        leader: First of the layers that share its input.
        site: Name of the layers whose statistics are needed together with its own; by default those that share its input.
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    leader: str
    site: str = ""

    @property
    def together(self) -> str:
        """What all layers that are calibrated in the same pass have in common."""
        return self.site or self.leader


@dataclass(frozen=True)
class ModelSize:
    """Memory that a model takes, in bytes; all but the weights for one image.

    Attributes:
        layers: The targeted layers, in forward order.
        weights: Parameters and buffers.
        pixels: The image as the model sees it.
        forward: Peak of the activations in a forward pass.
        backward: Peak of the activations in a forward and backward pass.
        boundary: Largest input of a segment (a block).
        outputs: Largest total output of the targeted layers of a segment.
        on_host: Whether the model computes on the host.
    """

    layers: Sequence[LayerSize]
    weights: int
    pixels: int
    forward: int
    backward: int
    boundary: int
    outputs: int
    on_host: bool = True


def probe_model(
    model: nn.Module, targets: Sequence[Target], with_gradients: bool, call: ModelCall = PLAIN_CALL
) -> ModelSize:
    """Measure a model on one image, with a backward pass if gradients will be needed.

    `call` says how the model is called, on which image (by default a black one), and of which outputs gradients are taken.

    Raises:
        ValueError: if the model's configuration has no image size, or a layer is not called.
    """
    image = call.example_for(model)[:1]
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.setdefault(name, (args[0], output))

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [listen(target.name) for target in targets]
    with hooks_removed_on_exit(handles), evaluation_mode(model):
        call.run(model, image)
        missing = [target.name for target in targets if target.name not in calls]
        if missing:
            raise ValueError(f"Layer {missing[0]!r} was not called; leave it out with exclude_modules.")
        leaders: dict[int, str] = {}
        layers = [
            LayerSize(name, target.shape, inputs[..., 0].numel(), leaders.setdefault(id(inputs), name))
            for target in sorted(targets, key=lambda target: list(calls).index(target.name))
            for name, (inputs, _) in [(target.name, calls[target.name])]
        ]
        boundary, outputs = _segments(model, image, layers, calls, call)
        calls.clear()
    with evaluation_mode(model):
        forward = live_bytes(model, lambda: call.run(model, image))
    backward = forward
    if with_gradients:
        with evaluation_mode(model), activation_gradients(model):
            backward = live_bytes(model, lambda: _gradients(model, image, call))
    return ModelSize(
        layers=layers,
        weights=weight_bytes(model),
        pixels=image.to(dtype=torch.float32).num_bytes,
        forward=forward,
        backward=backward,
        boundary=boundary,
        outputs=outputs,
        on_host=placement(model)[0].type == "cpu",
    )


def _segments(
    model: nn.Module,
    image: ModelInputs,
    layers: Sequence[LayerSize],
    calls: dict[str, tuple[Tensor, Tensor]],
    call: ModelCall,
) -> tuple[int, int]:
    """Return the bytes of the largest segment input and of the largest layer outputs; zeros without segments."""
    try:
        segments = find_segments(model, [layer.name for layer in layers if blocks_around(model, layer.name)])
    except ValueError:
        return 0, 0
    boundaries: list[int] = []

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        boundaries.append(Call(args, kwargs).num_bytes)

    # A stage of Swin returns less than it receives, so every segment is looked at.
    handles = [model.get_submodule(segment).register_forward_pre_hook(hook, with_kwargs=True) for segment in segments]
    with hooks_removed_on_exit(handles):
        call.run(model, image)
    outputs = [
        sum(
            output.numel() * output.element_size()
            for name, (_, output) in calls.items()
            if name.startswith(f"{segment}.")
        )
        for segment in segments
    ]
    return max(boundaries), max(outputs)


def _gradients(model: nn.Module, image: ModelInputs, call: ModelCall) -> None:
    """Run a forward and backward pass."""
    found = call(model, image.requiring_gradients())
    torch.stack([tensor.sum() for tensor in found.tensors]).sum().backward()
