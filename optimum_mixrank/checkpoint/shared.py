"""Linear layers that share their first factor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .modeling import FactoredLinear, GuardedLinear
from .narrowing import linear_like
from .pivoted import PivotedLinear
from .rank_map import FactoredLayer


class _Result(NamedTuple):
    """The joint outputs, the tensors and the state that they were computed from, and the members that wait for theirs."""

    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]
    output: Tensor
    waiting: frozenset[int]


class _Memo:
    """Holds the joint outputs from the call of the first member until that of the last; never copied or pickled."""

    result: _Result | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memo:
        return _Memo()

    def __reduce__(self) -> tuple[type[_Memo], tuple[()]]:
        return _Memo, ()


class SharedLinear(GuardedLinear):
    """One of several linear layers with the same input, whose stacked weights are one factored layer `[W₁; W₂; …] = B A`.

    The first of them holds that layer as its submodule `joint`; the others refer to the first. Whichever of them is called
    first with an input computes the outputs of all, two products, and the others take theirs when they are called with the
    very same tensor. For the empty `weight` see `GuardedLinear`.

    Attributes:
        members: Canonical names of all these layers, in the order of their rows.
        position: Position of this one.
        rows: Its rows of the joint layer.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        members: Sequence[str],
        position: int,
        joint: FactoredLinear,
        holder: SharedLinear | None = None,
    ) -> None:
        weight = joint.weight
        super().__init__(joint.in_features, sizes[position], weight.device, weight.dtype)
        self.members = tuple(members)
        self.position = position
        start = sum(sizes[:position])
        self.rows = slice(start, start + sizes[position])
        # Not a submodule of the others, whose tensors would be saved several times. They refer to the first member rather
        # than to the joint layer, which may be replaced while it is trained.
        object.__setattr__(self, "_holder", holder)
        if holder is None:
            self.joint = joint
            self._memo = _Memo()

    @property
    def holder(self) -> SharedLinear:
        """The member that holds the joint layer."""
        holder: SharedLinear | None = self._holder
        return self if holder is None else holder

    @property
    def factored(self) -> FactoredLinear:
        """The joint layer."""
        joint = self.holder.joint
        assert isinstance(joint, FactoredLinear)  # as `share` makes it
        return joint

    @property
    def bias(self) -> Tensor | None:
        """The bias, `[out_features]`, or None."""
        bias = self.factored.bias
        return None if bias is None else bias[self.rows]

    def product(self) -> Tensor:
        """Return the weight `W`, `[out_features, in_features]`, multiplied in float64; see `FactoredLinear.product`."""
        return self.factored.product()[self.rows]

    @property
    def rank(self) -> int:
        """The rank of the joint layer."""
        return self.factored.rank

    @property
    def num_values(self) -> int:
        """Number of values stored for its own rows; the first member counts the first factor too, except for pivot rows.

        A pivot row counts for the member that it belongs to. All members together have those of the joint layer.
        """
        joint = self.factored
        if not isinstance(joint, PivotedLinear):
            own = self.out_features * joint.rank
            return own if self.position else own + joint.rank * joint.in_features
        own_pivots = sum(self.rows.start <= row < self.rows.stop for row in joint.pivots)
        return own_pivots * joint.in_features + (self.out_features - own_pivots) * joint.rank

    @property
    def entry(self) -> FactoredLayer:
        """The entry of this layer in the rank map."""
        entry = self.factored.entry
        return replace(entry, pivots=None if self.position else entry.pivots, members=self.members)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer that computes the same function, multiplied in float64 and rounded once."""
        dense = self.factored.to_linear()
        bias = None if dense.bias is None else dense.bias[self.rows]
        return linear_like(dense, dense.weight[self.rows], bias).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        # Called for every token batch of every block: `narrow` takes a third of the time of an index with an ellipsis.
        return self.holder._outputs(input, self.position).narrow(-1, self.rows.start, self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        names = ", ".join(name.rpartition(".")[2] for name in self.members)
        return f"in_features={self.in_features}, out_features={self.out_features}, shared by {names}"

    def _replicate_for_data_parallel(self) -> SharedLinear:
        # The copy on another device would refer to the holder on the first one.
        raise NotImplementedError(
            "Layers that share a factor cannot be copied to several GPUs by `nn.DataParallel`, which `Trainer` uses in a "
            "single process. Start one process for each GPU with `torchrun`, or set `CUDA_VISIBLE_DEVICES=0`."
        )

    def _outputs(self, input: Tensor, position: int) -> Tensor:
        """Return the outputs of the joint layer for all members."""
        joint = self.joint
        tensors, state = _dependencies(input, joint)
        known = self._memo.result
        if known is not None and position in known.waiting and _same(known.tensors, tensors) and known.state == state:
            output, waiting = known.output, known.waiting - {position}
        else:
            output = joint(input)
            waiting = frozenset(range(len(self.members))) - {position}
        # Assigned at once, so that another thread sees a whole result; if it replaces this one, only time is lost.
        self._memo.result = _Result(tensors, state, output, waiting) if waiting else None
        return output


def _dependencies(input: Tensor, joint: nn.Module) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return the tensors from which the outputs are computed, and all else on which these depend.

    Tensors rather than their ids, since the id of one that is gone could be given again.
    """
    if torch.compiler.is_compiling():
        # Nothing can change between the calls that are compiled together.
        return (input,), ()
    tensors = (input, *_parameters(joint))
    device = input.device.type
    # Some devices, such as the meta device, know no autocast.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else None
    return tensors, (*_versions(tensors), torch.is_grad_enabled(), dtype, joint.training)


def _parameters(joint: nn.Module) -> Iterable[Tensor]:
    """Return the parameters but for those on the meta device: offloaded ones are other tensors after every call."""
    first, second = joint._modules["factor_a"], joint._modules["factor_b"]
    if type(first) is nn.Linear and type(second) is nn.Linear:
        # In a fraction of the time that the search through all modules takes, once for each layer and call.
        parameters = (*first._parameters.values(), *second._parameters.values())
        return [each for each in parameters if each is not None and not each.is_meta]
    return [each for each in joint.parameters() if not each.is_meta]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # of tensors that are made for inference
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _same(known: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    return len(known) == len(tensors) and all(map(is_, known, tensors))


def share(joint: FactoredLinear, sizes: Sequence[int], members: Sequence[str]) -> list[SharedLinear]:
    """Return the layers that share a joint one.

    Args:
        joint: The factored layer of the stacked weights.
        sizes: Number of outputs of each layer.
        members: Their canonical names.

    Raises:
        ValueError: if the sizes do not add up.
    """
    if sum(sizes) != joint.out_features or len(sizes) != len(members):
        raise ValueError(f"Layers with {list(sizes)} outputs do not make up one with {joint.out_features}.")
    first = SharedLinear(sizes, members, 0, joint)
    others = [SharedLinear(sizes, members, position, joint, first) for position in range(1, len(sizes))]
    return [layer.train(joint.training) for layer in (first, *others)]


def member_sizes(out_features: int, dense: Sequence[int]) -> list[int]:
    """Return the numbers of outputs of layers that make up one, given those of the original ones, which are in proportion.

    Raises:
        ValueError: if the outputs cannot be divided in this proportion.
    """
    total = sum(dense)
    if any(out_features * size % total for size in dense):
        raise ValueError(f"{out_features} outputs cannot be divided in the proportion of {list(dense)}.")
    return [out_features * size // total for size in dense]
