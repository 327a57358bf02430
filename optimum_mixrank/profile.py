"""The public names of the profile that `MixRankCompressor.profile` returns."""

from .allocation.profile import BudgetPoint
from .reporting.profile import RankProfile


__all__ = ["BudgetPoint", "RankProfile"]
