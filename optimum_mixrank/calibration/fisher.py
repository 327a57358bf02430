"""Fisher information of layer outputs: gradients of what the model itself would predict, no labels needed."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Collection, Sequence

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
    """Context manager that accumulates `E[g gᵀ]` of the outputs of linear layers; on leaving, no hook remains.

    Every gradient is taken in as soon as it is there, and let go.

    Args:
        model: The model that will run, with gradients enabled.
        names: Module names of the layers.
        samples: Random probes per batch; each costs a backward pass.
        seed: Of the probes.
        projected: Those of the layers of which `input_moment` and `energy` alone are wanted, `moment` not. Layers with
            more outputs than inputs are then far cheaper: their gradients are projected on the columns of the weight.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], samples: int = 1, seed: int = 42, projected: Sequence[str] = ()
    ) -> None:
        super().__init__({name: model.get_submodule(name) for name in names})
        self._samples = samples
        self._seed = seed
        # By layer, a gradient of zeros for every call in this batch, and those whose own gradient is yet to come.
        self._called: dict[str, dict[int, Tensor]] = {}
        self._awaited: dict[str, dict[int, Tensor]] = {}
        self._calls = itertools.count()
        self._scale = 1.0
        # Each device of a model over several has a thread of its own on the way back.
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()
        self._accumulators = {name: MomentAccumulator() for name in names}
        self._accumulators |= {_squares(name): MomentAccumulator(full=False) for name in projected}
        self._bases = {name: torch.linalg.qr(self._weight(name).float()).Q for name in projected}

    def update(self, output: ModelOutput, batch: int = 0) -> None:
        """Take in the gradients of the batch that has just run.

        Of all that the output depends on, its images alone may require gradients; see `activation_gradients`.

        Args:
            output: Of the model.
            batch: Number of the batch among those of all processes, on which its probes depend.
        """
        generator = _generator(self._seed, batch)
        # A thread of a device knows nothing of the precision that is set here.
        self._context = contextvars.copy_context()
        for sample in range(self._samples):
            scalar = probe_likelihood(output, generator) * self._scale
            self._awaited = {name: dict(calls) for name, calls in self._called.items()}
            # Not `grad`, which would hold the gradients of all layers at once.
            scalar.backward(retain_graph=sample + 1 < self._samples)
            for name, calls in self._awaited.items():
                # A layer on which the output does not depend has the gradient zero.
                for zeros in calls.values():
                    self._take_in(name, zeros.clone())
        self._forget()

    def merge(self, processes: Processes) -> None:
        """See `MomentAccumulator.merge`."""
        for accumulator in self._accumulators.values():
            accumulator.merge(processes)

    def moment(self, name: str) -> Tensor:
        """`E[g gᵀ]` over tokens and probes, `[out_features, out_features]`, float64.

        Raises:
            ValueError: if the layer was never called, or its gradients hold NaN or Inf.
        """
        assert name not in self._bases  # of a projected layer it is not known
        return self._second_moment(name, name)

    def input_moment(self, name: str) -> Tensor:
        """`E[(Wᵀg) (Wᵀg)ᵀ]` over tokens and probes, `[in_features, in_features]`, float64.

        Raises:
            ValueError: as `moment`.
        """
        moment = self._second_moment(name, name)
        weight = self._weight(name).to(moment)
        # The columns of the weight by those of the basis; the basis is orthonormal to float32's precision.
        columns = self._bases[name].to(moment).T @ weight if name in self._bases else weight
        return columns.T @ moment @ columns

    def energy(self, name: str) -> Tensor:
        """`E[‖g‖²]` over tokens and probes, `[]`, float64.

        Raises:
            ValueError: as `moment`.
        """
        if name in self._bases:
            return self._second_moment(name, _squares(name)).sum()
        return self._second_moment(name, name).trace()

    def statistics(self, name: str, required: Collection[Statistic]) -> dict[str, Tensor]:
        """Those of the required statistics that are taken from gradients, by name. To be asked for once.

        Raises:
            ValueError: as `moment`.
        """
        found = {
            Statistic.GRADIENT_MOMENT: self.moment,
            Statistic.INPUT_GRADIENT_MOMENT: self.input_moment,
            Statistic.GRADIENT_ENERGY: self.energy,
        }
        taken = {statistic.value: take(name) for statistic, take in found.items() if statistic in required}
        self._accumulators.pop(name)
        return taken

    def _take_in(self, name: str, gradient: Tensor) -> None:
        if name not in self._bases:
            self._accumulators[name].update(gradient)
            return
        if gradient.dtype != torch.float64:
            gradient = gradient.float()
        self._accumulators[_squares(name)].update(gradient)
        with float32_products(gradient.device):
            # Orthonormal columns, not those of the weight itself, so that no direction is lost in float32's rounding.
            self._accumulators[name].update(gradient @ self._bases[name].to(gradient.dtype))

    def _second_moment(self, name: str, key: str) -> Tensor:
        accumulator = self._accumulators[key]
        if not accumulator.is_finite:
            raise ValueError(
                f"NaN or Inf in the gradients of layer {name!r}; a half-precision model may overflow, load it with "
                "dtype='float32'."
            )
        return accumulator.second_moment()

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
                # Gradients of a confident model are too small for it; as in mixed-precision training they are scaled.
                self._scale = 2.0**14

            def arrived(gradient: Tensor | None) -> None:
                if gradient is None:
                    return
                with self._lock:
                    del self._awaited[name][call]
                    scaled = self._scale != 1
                    self._context.run(self._take_in, name, gradient.float() / self._scale if scaled else gradient)

            if output.requires_grad:
                output.register_hook(arrived)

        return hook

    def _forget(self) -> None:
        self._called.clear()
        self._scale = 1.0


def _squares(name: str) -> str:
    return f"{name}:squares"


def _generator(seed: int, batch: int) -> torch.Generator:
    """The same random numbers for a batch, whichever process it runs in."""
    state = np.random.SeedSequence(seed, spawn_key=(batch,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def probe_likelihood(output: ModelOutput, generator: torch.Generator) -> Tensor:
    """A random scalar whose gradient `g` by any activation has the Fisher information as its second moment.

    For class probabilities `p` the Fisher information of the logits is `diag(p) - p pᵀ = S Sᵀ` with
    `S = diag(√p) (I - √p √pᵀ)`. Drawing a label from `p` gives a gradient with that second moment; `S v` with normal
    `v` has the same one, and weighs all classes in every draw instead of mostly the likeliest.

    Other outputs count as Gaussian with the variance of the feature tensor times its size, so that a loss of 1/2 is an
    error as large as the features' own spread.

    Args:
        output: Logits or features of a batch, with their graph.
        generator: On the CPU, so that all devices see the same probes.

    Returns:
        The sum over images; images do not mix.
    """
    if output.logits is not None:
        # On the host, since Apple's GPUs have no float64.
        root = output.logits.detach().float().cpu().double().softmax(dim=-1).sqrt()
        noise = torch.randn(root.shape, generator=generator, dtype=torch.float64)
        direction = root * (noise - root * (root * noise).sum(dim=-1, keepdim=True))
        return (output.logits * direction.to(output.logits)).sum()
    total = output.features[0].new_zeros(())
    for feature in output.features:
        values = feature.detach().float()
        spread = values.std(correction=0)
        # Features that are all alike, a single value say, are measured by their size.
        spread = torch.where(spread > 0, spread, values.square().mean().sqrt())
        scale = spread * (values[0].numel() * len(output.features)) ** 0.5
        noise = torch.randn(feature.shape, generator=generator).to(feature)
        total = total + (feature * noise).sum() / scale.clamp_min(1e-12)
    return total
