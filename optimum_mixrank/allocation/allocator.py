"""What an allocator is, and the registry of allocators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from .problem import AllocationProblem, RankAllocation


class Allocator(ABC):
    """Distributes ranks over layers under a budget.

    Attributes:
        name: Value of `MixRankConfig.allocation`.
    """

    name: ClassVar[str]

    @abstractmethod
    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """Choose a rank for every layer; the budget is not exceeded, and what is left is too little for one more step.

        Raises:
            BudgetError: if the smallest ranks exceed the budget.
        """


ALLOCATORS: dict[str, type[Allocator]] = {}

AllocatorClass = TypeVar("AllocatorClass", bound=type[Allocator])


def register_allocator(cls: AllocatorClass) -> AllocatorClass:
    """Class decorator: make an allocator known under its name.

    Raises:
        ValueError: if the name is taken.
    """
    if cls.name in ALLOCATORS:
        raise ValueError(f"An allocator called {cls.name!r} is registered already; choose another name.")
    ALLOCATORS[cls.name] = cls
    return cls


def get_allocator(name: str) -> Allocator:
    """An instance of the allocator with this name.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    if name not in ALLOCATORS:
        raise ValueError(f"allocation={name!r} is unknown; choose one of {', '.join(map(repr, ALLOCATORS))}.")
    return ALLOCATORS[name]()
