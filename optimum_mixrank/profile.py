"""Public names of rank profiles, which `MixRankCompressor.profile` returns."""

from .allocation.profile import BudgetPoint
from .reporting.profile import RankProfile


__all__ = ["BudgetPoint", "RankProfile"]
