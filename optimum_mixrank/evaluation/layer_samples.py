"""Layers to be timed: of the shapes that a model has, dense and factored, with all hidden units and with fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.sites import Mlp, Site
from ..checkpoint.loading import empty_layer
from ..checkpoint.modeling import FactoredLinear
from ..checkpoint.names import Target
from ..checkpoint.rank_map import FactoredLayer, break_even, encode_rows
from ..checkpoint.shared import member_sizes, share
from ..runtime.hooks import hooks_removed_on_exit


MAX_BYTES = 2**26
"""Most bytes of weights that are read one after another, which is more than the caches of most processors hold."""

MAX_COPIES = 12


@dataclass(frozen=True)
class SampleGroup:
    """Layers of a model that have one shape and one role, and are therefore as fast as each other.

    Attributes:
        target: One of them, or several with the same input as one.
        count: How many there are.
        tokens: Vectors that each maps for one image.
        side: The side that shrinks with the hidden units of its MLP, `"out"` or `"in"`; empty if none does.
        chunks: Number of stacked parts of its outputs that lose the same units.
        after: What the model applies to the outputs: the activation of an MLP; None where it is not a module.
    """

    target: Target
    count: int
    tokens: int
    side: str = ""
    chunks: int = 1
    after: nn.Module | None = None

    @property
    def members(self) -> int:
        """Number of layers that it stands for."""
        return len(self.target.layers)

    @property
    def full_size(self) -> int:
        """Size of the side that shrinks; the outputs, if none does."""
        return self.target.shape[1 if self.side == "in" else 0]

    def shape(self, size: int) -> tuple[int, int]:
        """Return `(out_features, in_features)` if the side that shrinks has this size."""
        m, n = self.target.shape
        return (m, size) if self.side == "in" else (size, n)

    def sizes(self, shares: Sequence[float]) -> tuple[int, ...]:
        """Return sizes that are about these shares of the full one, such that the units are multiples of 8."""
        if not self.side:
            return (self.full_size,)
        parts = self.members * self.chunks if self.side == "out" else 1
        units = self.full_size // parts
        kept = {min(units, max(2, _multiple(share * units))) for share in shares} | {units}
        return tuple(parts * each for each in sorted(kept))

    def ranks(self, size: int, layout: str, shares: Sequence[float]) -> tuple[int, ...]:
        """Return ranks that are about these shares of the break-even rank, multiples of 8 where that can be."""
        m, n = self.shape(size)
        # A pivoted layer has to have one row that is not a pivot.
        largest = max(1, min(int(break_even(m, n, layout)), m - 1, n))
        return tuple(sorted({min(largest, max(1, _multiple(share * largest))) for share in shares}))


def _multiple(value: float) -> int:
    return round(value / 8) * 8 if value >= 8 else round(value)


class Sample(nn.Module):
    """Copies of a layer with weights of their own, called one after another on the same input, as in a model.

    Args:
        copies: Each is one layer, or several that the model calls with the same input.
        after: Applied to every output, or None.
        keep: Whether to return all outputs, which compilers would otherwise not compute.
    """

    def __init__(self, copies: Sequence[Sequence[nn.Module]], after: nn.Module | None, keep: bool) -> None:
        super().__init__()
        self.copies = nn.ModuleList([nn.ModuleList(parts) for parts in copies])
        self.after = after
        self.keep = keep

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Run all copies."""
        kept = []
        for parts in self.copies:
            for part in parts:
                output = part(input)
                if self.after is not None:
                    output = self.after(output)
                if self.keep:
                    kept.append(output)
        return tuple(kept)


def sample(group: SampleGroup, size: int, layout: str | None, rank: int | None, keep: bool) -> Sample:
    """Return layers with random weights of a group's shape, narrowed to a size; dense if layout and rank are None."""
    first = _new_layer(group, size, layout, rank)
    weights = sum(each.numel() * each.element_size() for part in first for each in part.parameters())
    count = max(1, min(group.count, MAX_COPIES, MAX_BYTES // max(weights, 1)))
    others = [_new_layer(group, size, layout, rank) for _ in range(count - 1)]
    return Sample([first, *others], group.after, keep).eval()


def _new_layer(group: SampleGroup, size: int, layout: str | None, rank: int | None) -> list[nn.Module]:
    dense, (m, n) = group.target.module, group.shape(size)
    sizes = member_sizes(m, [each.module.out_features for each in group.target.layers])
    bias, device = dense.bias is not None, group.target.layers[0].module.weight.device
    if layout is None or rank is None:
        return [_filled(nn.Linear(n, rows, bias, "meta", dense.weight.dtype), device) for rows in sizes]
    # Spread over all rows, as those of a real layer.
    pivots = encode_rows(row * m // rank for row in range(rank)) if layout == "pivoted" else None
    layer = _filled(empty_layer(dense, FactoredLayer(rank, bias, layout, pivots, shape=(m, n))), device)
    if group.members == 1:
        return [layer]
    assert isinstance(layer, FactoredLinear)  # since it has a rank
    return list(share(layer, sizes, [each.canonical_name for each in group.target.layers]))


@torch.no_grad()
def _filled(layer: nn.Module, device: torch.device) -> nn.Module:
    """Give a layer on the meta device random values, since some processors multiply zeros or denormals at another speed."""
    layer = layer.to_empty(device=device)
    for parameter in layer.parameters():
        parameter.normal_(std=0.05)
    return layer


class Passing(nn.Module):
    """Takes the place of a linear layer and costs next to nothing: its outputs are its inputs, cut off or repeated.

    Args:
        dense: The layer, whose parameters stay within reach of models that look at them.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        if self.out_features > self.in_features:
            input = torch.cat([input] * -(-self.out_features // self.in_features), dim=-1)
        return input if self.out_features == input.shape[-1] else input[..., : self.out_features]


def sample_groups(
    targets: Sequence[Target], sites: Sequence[Site], tokens: Mapping[str, int], activations: Mapping[str, nn.Module]
) -> list[SampleGroup]:
    """Group the layers of a model by shape, tokens and role; layers that may share a factor form groups besides.

    Args:
        targets: All linear layers of the encoder.
        sites: Those that may share a first factor, and MLPs.
        tokens: Vectors per image by module name.
        activations: What follows the first layer of an MLP, by the name of the site.
    """
    roles: dict[str, dict[str, Any]] = {}
    joints: list[tuple[Target, dict[str, Any]]] = []
    for site in sites:
        if not isinstance(site, Mlp):
            joints.append((site.joint, {}))
            continue
        first = {"side": "out", "chunks": site.chunks_of(site.first), "after": activations.get(site.name)}
        if site.first.members:
            joints.append((site.first, first))
        else:
            roles[site.first.name] = first
        roles[site.second.name] = {"side": "in"}
    found: dict[tuple[Any, ...], SampleGroup] = {}
    for target, role in [*((target, roles.get(target.name, {})) for target in targets), *joints]:
        vectors = tokens[target.layers[0].name]
        key = (*target.shape, vectors, len(target.layers), role.get("side", ""))
        count = found[key].count + 1 if key in found else 1
        found[key] = SampleGroup(target, count, vectors, **role)
    return list(found.values())


def find_activations(model: nn.Module, mlps: Sequence[Mlp], image: Tensor) -> dict[str, tuple[str, nn.Module]]:
    """Return the modules that the model calls between the two layers of its MLPs, with their names, by site.

    Only modules without parameters that keep the shape count, since hidden units may be removed.
    """
    calls: list[tuple[str, nn.Module, bool]] = []
    handles = []
    for name, module in model.named_modules():
        if not list(module.children()):

            def hook(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                same = len(args) == 1 and isinstance(output, Tensor) and args[0].shape == output.shape
                calls.append((name, module, same and not isinstance(module, nn.Dropout | nn.Identity)))

            handles.append(module.register_forward_hook(hook))
    with hooks_removed_on_exit(handles), torch.no_grad():
        model(pixel_values=image)
    order = [name for name, _, _ in calls]
    found = {}
    for mlp in mlps:
        if mlp.first.members:
            continue
        start, end = order.index(mlp.first.name), order.index(mlp.second.name)
        between = [call for call in calls[start + 1 : end] if call[2] and not list(call[1].parameters())]
        if len(between) == 1:
            found[mlp.name] = between[0][0], between[0][1]
    return found
