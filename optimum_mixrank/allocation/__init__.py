"""Distribution of ranks over layers under one budget: NumPy arrays in, ranks out.

A new allocator is one file with one registered class.
"""

from .allocator import ALLOCATORS, Allocator
from .global_optimum import GlobalAllocator
from .greedy import GreedyAllocator
from .problem import AllocationProblem, BudgetError, LayerProfile, RankAllocation
from .remainder import raise_evenly, spend_remainder
from .uniform import UniformAllocator


__all__ = [
    "ALLOCATORS",
    "AllocationProblem",
    "Allocator",
    "BudgetError",
    "GlobalAllocator",
    "GreedyAllocator",
    "LayerProfile",
    "RankAllocation",
    "UniformAllocator",
    "raise_evenly",
    "spend_remainder",
]
