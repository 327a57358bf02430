"""A registry: the classes among which a field of the configuration chooses by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar


Entry = TypeVar("Entry")


class Registry(Mapping[str, type[Entry]], Generic[Entry]):
    """Classes by their `name`, in the order of their registration.

    Args:
        field: The field of `MixRankConfig` whose values the names are.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._classes: dict[str, type[Entry]] = {}

    def register(self, cls: type[Entry]) -> type[Entry]:
        """Class decorator: make a class known under its `name`.

        Raises:
            ValueError: if the name is taken.
        """
        name: str = cls.name  # type: ignore[attr-defined]
        if name in self._classes:
            raise ValueError(f"{self._field}={name!r} is registered already; choose another name.")
        self._classes[name] = cls
        return cls

    def create(self, name: str) -> Entry:
        """An instance of the class with this name.

        Raises:
            ValueError: if there is none; the message lists those there are.
        """
        if name not in self._classes:
            known = ", ".join(map(repr, self._classes))
            raise ValueError(f"{self._field}={name!r} is unknown; choose one of {known}.")
        return self._classes[name]()

    def __getitem__(self, name: str) -> type[Entry]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)
