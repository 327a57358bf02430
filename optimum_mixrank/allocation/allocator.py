"""The interface of allocators, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ..runtime import registry
from .problem import AllocationProblem, RankAllocation


class Allocator(ABC):
    """Distributes ranks over layers under a budget.

    Attributes:
        name: The value of `MixRankConfig.allocation` that selects it.
    """

    name: ClassVar[str]

    @abstractmethod
    def allocate(self, problem: AllocationProblem) -> RankAllocation:
        """Choose a rank for every layer within the budget, such that the remainder is too little for any layer's next step.

        Raises:
            BudgetError: if the smallest ranks exceed the budget.
        """


ALLOCATORS: registry.Registry[Allocator] = registry.ALLOCATORS
