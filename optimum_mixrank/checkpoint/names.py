"""The names of a model's linear layers, in memory and on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from .modeling import GuardedLinear
from .narrowing import stacked


_PREFIX_CHANGE = "PrefixChange"


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
        # Some models pass on sizes that are not integers.
        rows, columns = self.module.weight.shape
        return rows, columns


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
    return {name: canonical(name) for name in _linear_names(model)}


def canonical_naming(model: nn.Module) -> Callable[[str], str]:
    """Return the function from the name of a layer of the model, which need not exist yet, to its canonical name."""
    to_disk = _naming_on_disk(model)
    prefix = getattr(model, "base_model_prefix", "")

    def canonical(name: str) -> str:
        on_disk = to_disk(name)
        return on_disk.removeprefix(f"{prefix}.") if prefix else on_disk

    return canonical


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """Return the names on disk of every linear layer of the model, dense or factored, by module name."""
    to_disk = _naming_on_disk(model)
    return {name: to_disk(name) for name in _linear_names(model)}


def _naming_on_disk(model: nn.Module) -> Callable[[str], str]:
    to_disk = _renaming_to_disk(model)
    return lambda name: to_disk(f"{name}.weight").removesuffix(".weight")


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | GuardedLinear)]


def saving_conversions(model: nn.Module) -> list[Any]:
    """Return how this release of Transformers converts parameters of a model that it saves; 4.x does not.

    Raises:
        RuntimeError: if this release keeps its tables elsewhere.
    """
    # Changes of the prefix hold for loading alone; early releases of 5.x have none.
    return [each for each in all_conversions(model) if type(each).__name__ != _PREFIX_CHANGE]


def prefix_changes(model: nn.Module) -> list[Any]:
    """Return the changes of prefixes that this release of Transformers makes when it loads a model; 4.x makes none.

    Raises:
        RuntimeError: if this release keeps its tables elsewhere.
    """
    return [each for each in all_conversions(model) if type(each).__name__ == _PREFIX_CHANGE]


def loading_renamings(model: nn.Module) -> list[Callable[[str], str]]:
    """Return how this release of Transformers may rename parameters of a model when it loads them.

    Raises:
        RuntimeError: if this release keeps its tables elsewhere.
    """
    older = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    found: list[Callable[[str], str]] = []
    if older:
        found.append(lambda name: _first_replaced(name, older))
    conversions = all_conversions(model)
    if conversions:
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        found.append(lambda name: apply_renamings(name, renamings))
    return found


def _first_replaced(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, replacement in patterns.items():
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def all_conversions(model: nn.Module) -> list[Any]:
    """Return all conversions of this release of Transformers for a model, in its order; 4.x has none.

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
    return list(get_model_conversion_mapping(model, add_legacy=False))


def reads_back(model: nn.Module, conversions: Sequence[Any]) -> bool:
    """Return whether names that are saved by these conversions are read again as what they were."""
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    forward = [each for each in all_conversions(model) if isinstance(each, WeightRenaming)]
    backward = [each.reverse_transform() for each in reversed(conversions) if isinstance(each, WeightRenaming)]
    return all(
        apply_renamings(apply_renamings(name, backward), forward) == name for name, _ in model.named_parameters()
    )


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
