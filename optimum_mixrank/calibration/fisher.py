"""Fisher information of layer outputs, from gradients of what the model itself predicts; no labels are needed."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ..decomposition.statistics import Statistic
from ..runtime.distributed import Processes
from ..runtime.hooks import OutputListener
from ..runtime.outputs import ModelOutput
from ..runtime.precision import float32_products
from .moments import MomentAccumulator


class GradientCollector(OutputListener):
    """Context manager that accumulates `E[g gᵀ]` of the outputs of linear layers; no hook remains when it is left.

    The model runs with gradients enabled; each of the `samples` random probes per batch costs a backward pass. Every
    gradient is added as soon as it is computed, and then freed.

    For the `projected` ones of the named layers, only `input_moment` and `energy` are available, not `moment`. This is
    far cheaper for layers with more outputs than inputs: gradients are projected onto the columns of the weight.

    `joints` gives, for names that stand for several layers which are called one after another, the names of these; their
    gradients are stacked.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        samples: int = 1,
        seed: int = 42,
        projected: Sequence[str] = (),
        joints: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        single = [layer for name in names for layer in joints.get(name, (name,))]
        super().__init__({name: model.get_submodule(name) for name in single})
        self.names = list(names)
        self._joints = {layer: name for name in names for layer in joints.get(name, ())}
        # By joint layer, the gradients of its parts that wait for those of the others.
        self._parts: dict[str, dict[str, list[Tensor]]] = {
            name: {layer: [] for layer in joints[name]} for name in names if name in joints
        }
        self._samples = samples
        self._seed = seed
        # By layer, a gradient of zeros for every call in this batch, and for the calls whose gradient is still to come.
        self._called: dict[str, dict[int, Tensor]] = {}
        self._awaited: dict[str, dict[int, Tensor]] = {}
        self._calls = itertools.count()
        self._scale = 1.0
        # If a model is spread over several devices, each of them runs its backward pass in a thread of its own.
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()
        self._accumulators = {name: MomentAccumulator() for name in names}
        self._squares = {name: MomentAccumulator(full=False) for name in projected}
        # Orthonormal columns rather than those of the weight, so that no direction is lost to rounding in float32.
        self._bases = {name: torch.linalg.qr(self._weight(name).float()).Q for name in projected}

    def update(self, output: ModelOutput, batch: int = 0) -> None:
        """Add the gradients of the batch that has just run; its probes depend on its number among those of all processes.

        Of all that the output depends on, only the images may require gradients; see `activation_gradients`.

        Raises:
            ValueError: if the output has no gradients.
        """
        generator = _generator(self._seed, batch)
        # The precision that is set here is unknown to the threads of other devices.
        self._context = contextvars.copy_context()
        for sample in range(self._samples):
            scalar = probe_likelihood(output, generator) * self._scale
            if not scalar.requires_grad:
                raise ValueError(
                    "The model's output has no gradients, perhaps because its `forward` runs under `torch.no_grad()`. Use "
                    "metric='second_moment' and leave out the steps of compensation that train."
                )
            self._awaited = {name: dict(calls) for name, calls in self._called.items()}
            # Unlike `grad`, this does not hold the gradients of all layers at the same time.
            scalar.backward(retain_graph=sample + 1 < self._samples)
            for name, calls in self._awaited.items():
                # The output does not depend on this call, so its gradient is zero.
                for zeros in calls.values():
                    self._add(name, zeros.clone())
        self._forget()

    def merge(self, processes: Processes) -> None:
        """Merge the gradients of all processes; see `MomentAccumulator.merge`."""
        for name in self.names:
            self._accumulators[name].merge(processes)
        for accumulator in self._squares.values():
            accumulator.merge(processes)

    def moment(self, name: str) -> Tensor:
        """Return `E[g gᵀ]` over tokens and probes, `[out_features, out_features]`, float64."""
        assert name not in self._bases  # unknown for a projected layer
        return _second_moment(name, self._accumulators)

    def input_moment(self, name: str) -> Tensor:
        """Return `E[(Wᵀg) (Wᵀg)ᵀ]` over tokens and probes, `[in_features, in_features]`, float64."""
        moment = _second_moment(name, self._accumulators)
        weight = self._weight(name).to(moment)
        # The weight in coordinates of the basis, which is orthonormal to the precision of float32.
        columns = self._bases[name].to(moment).T @ weight if name in self._bases else weight
        return columns.T @ moment @ columns

    def energy(self, name: str) -> Tensor:
        """Return `E[‖g‖²]` over tokens and probes, `[]`, float64."""
        if name in self._squares:
            return _second_moment(name, self._squares).sum()
        return _second_moment(name, self._accumulators).trace()

    def statistics(self, name: str, required: Collection[Statistic]) -> dict[str, Tensor]:
        """Return those of the required statistics that are taken from gradients, once.

        Raises:
            ValueError: if the layer was never called, or its gradients contain NaN or Inf.
        """
        methods = {
            Statistic.GRADIENT_MOMENT: self.moment,
            Statistic.INPUT_GRADIENT_MOMENT: self.input_moment,
            Statistic.GRADIENT_ENERGY: self.energy,
        }
        found = {statistic.value: method(name) for statistic, method in methods.items() if statistic in required}
        self._accumulators.pop(name)
        return found

    def _add(self, layer: str, gradient: Tensor) -> None:
        name = layer
        if name in self._joints:
            name = self._joints[name]
            parts = self._parts[name]
            parts[layer].append(gradient)
            if not all(parts.values()):
                return
            # Of several calls, those of all parts come in the same order.
            gradient = torch.cat([waiting.pop(0) for waiting in parts.values()], dim=-1)
        if name not in self._bases:
            self._accumulators[name].update(gradient)
            return
        if gradient.dtype != torch.float64:
            gradient = gradient.float()
        self._squares[name].update(gradient)
        with float32_products(gradient.device):
            self._accumulators[name].update(gradient @ self._bases[name].to(gradient.dtype))

    def _weight(self, name: str) -> Tensor:
        weight = self._layers[name].weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            call = next(self._calls)
            # A view of one zero takes no memory.
            self._called.setdefault(name, {})[call] = output.new_zeros(()).expand(output.shape)
            if output.dtype == torch.float16:
                # The gradients of a confident model are too small for float16; they are scaled as in mixed precision.
                self._scale = 2.0**14

            def add(gradient: Tensor | None) -> None:
                if gradient is None:
                    return
                with self._lock:
                    del self._awaited[name][call]
                    scaled = self._scale != 1
                    self._context.run(self._add, name, gradient.float() / self._scale if scaled else gradient)

            if output.requires_grad:
                output.register_hook(add)

        return hook

    def _forget(self) -> None:
        self._called.clear()
        for parts in self._parts.values():
            for waiting in parts.values():
                waiting.clear()
        self._scale = 1.0


def _second_moment(name: str, accumulators: dict[str, MomentAccumulator]) -> Tensor:
    accumulator = accumulators[name]
    if not accumulator.is_finite:
        raise ValueError(
            f"NaN or Inf in the gradients of layer {name!r}; a half-precision model may overflow, load it with "
            "dtype='float32'."
        )
    return accumulator.second_moment()


def _generator(seed: int, batch: int) -> torch.Generator:
    """Return a generator that depends on seed and batch alone, not on the process that the batch runs in."""
    state = np.random.SeedSequence(seed, spawn_key=(batch,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def probe_likelihood(output: ModelOutput, generator: torch.Generator) -> Tensor:
    """Return a random scalar whose gradient `g` by any activation has the Fisher information as its second moment.

    For class probabilities `p` the Fisher information of the logits is `diag(p) - p pᵀ = S Sᵀ` with
    `S = diag(√p) (I - √p √pᵀ)`. Drawing a label from `p` gives a gradient with that second moment; `S v` with normal
    `v` has the same one, and involves all classes in every draw instead of mostly the likeliest.

    Distributions at many places, such as pixels, are treated alike, for the mean over all places.

    Other outputs are treated as Gaussian, with the variance of the feature tensor times its size, so that an error as
    large as the features' own spread has a loss of 1/2.

    The scalar is a sum over images, which do not mix. The generator is on the CPU: all devices see the same probes.
    """
    if output.logits is not None:
        # On the host, since Apple's GPUs have no float64.
        direction = _direction(output.logits.detach().float().cpu().double(), generator)
        return (output.logits * direction.to(output.logits)).sum()
    total = output.tensors[0].new_zeros(())
    for logits in output.distributions:
        places = logits[0].numel() // logits.shape[-1] * len(output.distributions)
        # Image by image, since there may be many pixels.
        directions = [_direction(each.detach().float().cpu(), generator) for each in logits]
        total = total + (logits * torch.stack(directions).to(logits)).sum() / places**0.5
    for feature in output.features:
        values = feature.detach().float()
        spread = values.std(correction=0)
        # Features that are all equal, such as a single value, are measured by their size instead.
        spread = torch.where(spread > 0, spread, values.square().mean().sqrt())
        scale = spread * (values[0].numel() * len(output.features)) ** 0.5
        noise = torch.randn(feature.shape, generator=generator).to(feature)
        total = total + (feature * noise).sum() / scale.clamp_min(1e-12)
    return total


def _direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return `S v` for every distribution, of the shape and dtype of the logits; see `probe_likelihood`."""
    root = logits.softmax(dim=-1).sqrt()
    noise = torch.randn(root.shape, generator=generator, dtype=root.dtype)
    return root * (noise - root * (root * noise).sum(dim=-1, keepdim=True))
