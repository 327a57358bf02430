"""Distribution of ranks over layers under one budget: numpy arrays in, ranks out.

A new allocator is one file with one class that is registered here.
"""

from .allocator import ALLOCATORS, Allocator, get_allocator, register_allocator
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
    "get_allocator",
    "raise_evenly",
    "register_allocator",
    "spend_remainder",
]
