"""Layers that are decided together: those that see the same input, and the two layers of an MLP.

They are found by structure, with one forward pass: layers called one after the other with the very same tensor share an
input; and two layers are an MLP if each input of the second depends on the outputs of the first at the same token and unit
alone, as through an activation or the product of a gate and a value.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..allocation.choice import LayerChoice
from ..checkpoint.modeling import replace_module
from ..checkpoint.names import Target, joint_target
from ..checkpoint.narrowing import selected_columns, selected_rows
from ..decomposition.mlp import rows_of_units
from ..runtime.forward import activation_gradients, evaluation_mode
from ..runtime.hooks import group_by_tensor, hooks_removed_on_exit
from ..runtime.logging import get_logger
from ..runtime.outputs import PLAIN_CALL, ModelCall, ModelOutput


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)


@dataclass(frozen=True)
class SharedInput:
    """Layers that see the same input and may share their first factor.

    Attributes:
        joint: All of them as one layer.
    """

    joint: Target

    @property
    def name(self) -> str:
        """Canonical name of the joint layer."""
        return self.joint.canonical_name

    @property
    def layers(self) -> tuple[Target, ...]:
        """The layers, in the order of their calls."""
        return self.joint.members


@dataclass(frozen=True)
class Mlp:
    """The two layers of an MLP, some of whose hidden units may be removed.

    Attributes:
        first: The layer whose outputs become the hidden units; gate and value are one joint layer.
        second: The layer that reads them.
    """

    first: Target
    second: Target

    @property
    def name(self) -> str:
        """Name of the site: the canonical names of both layers."""
        return f"{self.first.canonical_name} > {self.second.canonical_name}"

    @property
    def layers(self) -> tuple[Target, ...]:
        """All layers of the model that belong to it, in the order of their calls."""
        return (*self.first.layers, self.second)

    @property
    def num_units(self) -> int:
        """Number of hidden units."""
        return self.second.module.in_features

    @property
    def has_fused_gate(self) -> bool:
        """Whether gates and values of all hidden units are the outputs of one layer."""
        return not self.first.members and self.first.module.out_features == 2 * self.num_units

    def chunks_of(self, target: Target) -> int:
        """Return the number of stacked parts of the outputs of one of its layers that lose the same units."""
        return 2 if target.name == self.first.name and self.has_fused_gate else 1


Site = SharedInput | Mlp


def find_sites(
    model: PreTrainedModel, targets: Sequence[Target], structures: Collection[str], call: ModelCall = PLAIN_CALL
) -> list[Site]:
    """Find the sites among layers of a model, which runs a few times on the images of the call.

    Args:
        model: The model.
        targets: The layers, in forward order.
        structures: Which structures to look for: `"shared"`, `"width"`.
        call: How the model is called, and the images that it is tried on.

    Returns:
        The sites in forward order; no layer is in two of them.
    """
    if not {"shared", "width"} & set(structures):
        return []
    try:
        example = call.example_for(model).requiring_gradients()
        with evaluation_mode(model), activation_gradients(model), _recorded(targets) as trace:
            call.run(model, example)
            groups = trace.groups()
            mlps = _find_mlps(trace, groups, "shared" in structures) if "width" in structures else []
    except Exception as error:
        logger.warning(
            f"How the layers of this {type(model).__name__} are connected is unknown, because it does not run on "
            f"the first images ({type(error).__name__}: {error}). Each is compressed by itself."
        )
        return []
    mlps = _confirmed(model, mlps, call)
    taken = {layer.name for mlp in mlps for layer in mlp.layers}
    sites: list[Site] = list(mlps)
    if "shared" in structures:
        for group in groups:
            for members in _alike([layer for layer in group if layer.name not in taken]):
                sites.append(SharedInput(joint_target(members)))
    order = {target.name: position for position, target in enumerate(targets)}
    return sorted(sites, key=lambda site: order[site.layers[0].name])


def _alike(group: Sequence[Target]) -> list[list[Target]]:
    """Divide layers into those with and those without bias, and leave out single ones."""
    kinds = [[each for each in group if (each.module.bias is None) == without] for without in (False, True)]
    return [kind for kind in kinds if len(kind) > 1]


class _Trace:
    """Inputs and outputs of layers during one forward pass, in the order of their calls."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.calls: list[tuple[Target, Tensor, Tensor]] = []
        self.handles = [target.module.register_forward_hook(self._hook(target)) for target in targets]

    def _hook(self, target: Target):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.calls.append((target, args[0], output))

        return hook

    def groups(self) -> list[list[Target]]:
        """Return the layers that are called once; those called one after another with the same tensor form a group."""
        counts = Counter(target.name for target, _, _ in self.calls)
        groups = group_by_tensor((target, tensor) for target, tensor, _ in self.calls)
        once = [[target for target in group if counts[target.name] == 1] for group in groups]
        return [group for group in once if group]

    def input_of(self, target: Target) -> Tensor:
        return next(tensor for each, tensor, _ in self.calls if each is target)

    def output_of(self, target: Target) -> Tensor:
        return next(tensor for each, _, tensor in self.calls if each is target)


@contextmanager
def _recorded(targets: Sequence[Target]) -> Iterator[_Trace]:
    trace = _Trace(targets)
    with hooks_removed_on_exit(trace.handles):
        yield trace


def _find_mlps(trace: _Trace, groups: Sequence[Sequence[Target]], may_share: bool) -> list[Mlp]:
    """Return the MLPs among groups of layers; two layers for gate and value are one only if they may share a factor."""
    found: list[Mlp] = []
    for group, following in itertools.pairwise(groups):
        second = following[0]
        # Of a chain of layers, such as a head of three, a layer in the middle belongs to one MLP.
        if any(each is mlp.second for mlp in found for each in group):
            continue
        if len(following) > 1 or len(group) > 1 + may_share or len({each.module.bias is None for each in group}) > 1:
            continue
        units = second.module.in_features
        sizes = [each.module.out_features for each in group]
        if sizes not in ([units], [2 * units], [units, units]):
            continue
        if _is_elementwise([trace.output_of(each) for each in group], trace.input_of(second)):
            found.append(Mlp(group[0] if len(group) == 1 else joint_target(group), second))
    return found


def _is_elementwise(outputs: Sequence[Tensor], hidden: Tensor) -> bool:
    """Return whether each hidden unit depends on the outputs at its own token and position alone.

    Args:
        outputs: Outputs of the first layer, `[..., units]` each; a single one may be `[..., 2 units]`.
        hidden: `[..., units]`.
    """
    units = hidden.shape[-1]
    parts = [part for output in outputs for part in output.split(units, dim=-1)]
    if not hidden.requires_grad or any(part.shape != hidden.shape for part in parts):
        return False
    chosen = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device) < 0.5
    gradients = torch.autograd.grad(hidden[chosen].sum(), outputs, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        return False
    for gradient in gradients:
        for part in gradient.split(units, dim=-1):
            if part[~chosen].count_nonzero() or not part[chosen].count_nonzero():
                return False
    return True


def _confirmed(model: PreTrainedModel, mlps: Sequence[Mlp], call: ModelCall) -> list[Mlp]:
    """Return the MLPs with which the model computes the same whether half of their units are removed or set to zero."""
    if not mlps or _can_be_narrowed(model, mlps, call):
        return list(mlps)
    confirmed = [mlp for mlp in mlps if _can_be_narrowed(model, [mlp], call)]
    others = [mlp.name for mlp in mlps if mlp not in confirmed]
    logger.info(f"All hidden units are kept where the model needs their number elsewhere: {', '.join(others)}.")
    return confirmed


def _can_be_narrowed(model: PreTrainedModel, mlps: Sequence[Mlp], call: ModelCall) -> bool:
    example = call.example_for(model)
    handles = []
    for mlp in mlps:

        def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0].clone()
            hidden[..., 1::2] = 0
            return (hidden, *args[1:])

        handles.append(mlp.second.module.register_forward_pre_hook(silence))
    with evaluation_mode(model), hooks_removed_on_exit(handles):
        expected = call(model, example)
    try:
        with evaluation_mode(model), _narrowed(model, mlps):
            found = call(model, example)
    except Exception:
        return False
    return _agree(expected, found)


@contextmanager
def _narrowed(model: nn.Module, mlps: Sequence[Mlp]) -> Iterator[None]:
    layers = [layer for mlp in mlps for layer in mlp.layers]
    try:
        for mlp in mlps:
            units = torch.arange(0, mlp.num_units, 2)
            for layer in mlp.layers[:-1]:
                rows = rows_of_units(units, layer.module.out_features, mlp.num_units)
                replace_module(model, layer.name, selected_rows(layer.module, rows))
            replace_module(model, mlp.second.name, selected_columns(mlp.second.module, units))
        yield
    finally:
        for layer in layers:
            replace_module(model, layer.name, layer.module)


def _agree(expected: ModelOutput, found: ModelOutput) -> bool:
    for a, b in zip(expected.tensors, found.tensors, strict=True):
        # Products of another size may be rounded otherwise.
        tolerance = min(1e3 * torch.finfo(a.dtype).eps, 0.05)
        if a.shape != b.shape:
            return False
        # Written so that NaN does not count as agreement.
        if not float((a.float() - b.float()).norm()) <= tolerance * float(a.float().norm()):
            return False
    return True


def removed_biases(sites: Sequence[Site], choices: Mapping[str, LayerChoice]) -> int:
    """Return how many biases the removed hidden units take with them; `choices` are by canonical name."""
    removed = 0
    for site in sites:
        width = choices[site.second.canonical_name].width if isinstance(site, Mlp) else None
        if isinstance(site, Mlp) and width is not None:
            rows = sum(each.module.out_features for each in site.first.layers if each.module.bias is not None)
            removed += rows - rows * width // site.num_units
    return removed
