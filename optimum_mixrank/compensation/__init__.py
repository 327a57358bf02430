"""Compensation: repair what a compression has broken, with unlabelled images.

A compensator is one file with one class that is registered here. Whatever it does, it is kept only if it lowers the
error on images that were held out.
"""

from .compensator import COMPENSATORS, Compensation, CompensationResult, Compensator
from .sequential import SequentialCompensator


__all__ = [
    "COMPENSATORS",
    "Compensation",
    "CompensationResult",
    "Compensator",
    "SequentialCompensator",
]
