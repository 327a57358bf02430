"""Registries of the classes among which a field of the configuration, or an option, chooses by name.

They are here so that a configuration can check names without importing the classes. The package's own classes are
imported when they are first requested; others register themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar


Entry = TypeVar("Entry")


class Registry(Mapping[str, type[Entry]], Generic[Entry]):
    """Classes by their `name`: the package's own first, then the others in the order of their registration.

    Args:
        field: The field of `MixRankConfig`, or the argument, that takes these names.
        built_in: For each built-in name, the module of this package that registers the class.
    """

    def __init__(self, field: str, built_in: Mapping[str, str] | None = None) -> None:
        self._field = field
        self._built_in = dict(built_in or {})
        self._classes: dict[str, type[Entry]] = {}

    def register(self, cls: type[Entry]) -> type[Entry]:
        """Register a class under its `name`; a class decorator.

        Raises:
            ValueError: if the name is taken.
        """
        name: str = getattr(cls, "name")  # noqa: B009 - mypy knows no `name` of an arbitrary class
        is_own = cls.__module__ == self._module(name)
        if name in self._classes or (name in self._built_in and not is_own):
            raise ValueError(f"{self._field}={name!r} is registered already; choose another name.")
        self._classes[name] = cls
        return cls

    def create(self, name: str) -> Entry:
        """Return an instance of the class with this name.

        Raises:
            ValueError: if there is none; the message lists the known names.
        """
        if name not in self:
            known = ", ".join(map(repr, self))
            raise ValueError(f"{self._field}={name!r} is unknown; choose one of {known}.")
        return self[name]()

    @property
    def added(self) -> list[str]:
        """The names of classes that are not the package's own."""
        return [name for name in self._classes if name not in self._built_in]

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._classes

    def __getitem__(self, name: str) -> type[Entry]:
        if name not in self._classes and name in self._built_in:
            importlib.import_module(self._module(name))
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._built_in, *self._classes]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _module(self, name: str) -> str:
        return f"{__name__.split('.')[0]}.{self._built_in.get(name, '')}"


METRICS: Registry[Any] = Registry(
    "metric",
    {
        "svd": "decomposition.svd",
        "diagonal": "decomposition.diagonal",
        "mean_input": "decomposition.mean_input",
        "second_moment": "decomposition.second_moment",
        "kfac": "decomposition.kfac",
    },
)
ALLOCATORS: Registry[Any] = Registry(
    "allocation",
    {
        "uniform": "allocation.uniform",
        "greedy": "allocation.greedy",
        "global": "allocation.global_optimum",
    },
)
COMPENSATORS: Registry[Any] = Registry(
    "compensation",
    {
        "sequential": "compensation.layerwise.sequential",
        "residual": "compensation.layerwise.residual",
        "blocks": "compensation.training.blocks",
        "distillation": "compensation.training.distillation",
    },
)
RUNTIMES: Registry[Any] = Registry(
    "runtime",
    {
        "onnx": "deployment.onnx_runtime",
        "openvino": "deployment.openvino_runtime",
        "executorch": "deployment.executorch_runtime",
        "torch": "deployment.torch_export",
    },
)
KINDS: Registry[Any] = Registry(
    "kind",
    dict.fromkeys(
        (
            "segments",
            "detection",
            "segmentation",
            "masks",
            "tokens",
            "classes",
            "depth",
            "heatmaps",
            "embeddings",
        ),
        "runtime.kinds",
    ),
)
MEASURES: Registry[Any] = Registry(
    "measure",
    {
        "mask_iou": "evaluation.measures.mask_iou",
        "matched_boxes": "evaluation.measures.matched_boxes",
        "cosine_similarity": "evaluation.measures.cosine_similarity",
        "retrieval_agreement": "evaluation.measures.retrieval_agreement",
        "agreement": "evaluation.measures.agreement",
        "kl": "evaluation.measures.kl",
        "feature_error": "evaluation.measures.feature_error",
        "correlation": "evaluation.measures.correlation",
    },
)
