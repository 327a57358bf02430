"""The names of a model's linear layers, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from .modeling import GuardedLinear
from .narrowing import stacked


@dataclass(frozen=True)
class Target:
    """A linear layer of the encoder, or several that see the same input, stacked as one.

    Attributes:
        name: Name of the module within the model.
        canonical_name: Name on disk, relative to the base model; key of the rank map.
        module: The layer.
        members: The layers that a joint one stands for, in the order of its rows; empty for a single layer.
    """

    name: str
    canonical_name: str
    module: nn.Linear
    members: tuple[Target, ...] = ()

    @property
    def layers(self) -> tuple[Target, ...]:
        """The layers of the model that it stands for: its members, or itself."""
        return self.members or (self,)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, `(out_features, in_features)`."""
        return self.module.out_features, self.module.in_features


def joint_target(members: Sequence[Target]) -> Target:
    """Return several layers that see the same input as one: `attention.query+key+value`.

    Raises:
        ValueError: if only some of them have a bias, or they have different numbers of inputs.
    """
    return Target(
        _joined([member.name for member in members]),
        _joined([member.canonical_name for member in members]),
        stacked([member.module for member in members]),
        tuple(members),
    )


def _joined(names: Sequence[str]) -> str:
    parent = names[0].rpartition(".")[0]
    last = [name.rpartition(".")[2] if name.rpartition(".")[0] == parent else name for name in names]
    return f"{parent}." * bool(parent) + "+".join(last)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return the canonical name of every linear layer of the model, dense or factored, by module name."""
    canonical = canonical_naming(model)
    return {
        name: canonical(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | GuardedLinear)
    }


def canonical_naming(model: nn.Module) -> Callable[[str], str]:
    """Return the function from the name of a layer of the model, which need not exist yet, to its canonical name."""
    to_disk = _renaming_to_disk(model)
    prefix = getattr(model, "base_model_prefix", "")

    def canonical(name: str) -> str:
        on_disk = to_disk(f"{name}.weight").removesuffix(".weight")
        return on_disk.removeprefix(f"{prefix}.") if prefix else on_disk

    return canonical


def saving_conversions(model: nn.Module) -> list[Any]:
    """Return how this release of Transformers converts parameters of a model that it saves; 4.x does not.

    Raises:
        RuntimeError: if this release keeps its tables elsewhere.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming  # noqa: F401 - needed wherever there are conversions
    except ImportError as error:
        raise RuntimeError(
            f"Transformers {transformers.__version__} renames parameters in a way that this version of optimum-mixrank "
            "does not know. Upgrade with `pip install --upgrade optimum-mixrank`."
        ) from error
    # Changes of the prefix hold for loading alone; early releases of 5.x have none.
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in found if type(each).__name__ != "PrefixChange"]


def _renaming_to_disk(model: nn.Module) -> Callable[[str], str]:
    """Return how this release of Transformers renames parameters when it saves them; 4.x does not.

    Raises:
        RuntimeError: if this release keeps its tables elsewhere, since names would be wrong without them.
    """
    transforms = saving_conversions(model)
    if not transforms:
        return lambda name: name
    # Where there are conversions, `saving_conversions` has found their module.
    from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings

    # The same steps in the same order as in `revert_weight_conversion`, which `save_pretrained` calls.
    unknown = {type(each).__name__ for each in transforms if not isinstance(each, WeightRenaming | WeightConverter)}
    if unknown:
        raise RuntimeError(
            f"Transformers {transformers.__version__} renames parameters by {', '.join(sorted(unknown))}, which this "
            "version of optimum-mixrank does not know. Upgrade with `pip install --upgrade optimum-mixrank`."
        )
    reverse = [transform.reverse_transform() for transform in reversed(transforms)]
    renamings = [transform for transform in reverse if isinstance(transform, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)
