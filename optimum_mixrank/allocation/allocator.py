"""What an allocator is, and the registry of allocators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ..runtime import registry
from ..runtime.registry import Registry
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


ALLOCATORS: Registry[Allocator] = registry.ALLOCATORS
