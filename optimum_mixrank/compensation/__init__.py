"""Compensation: repair what a compression has broken, with unlabelled images.

A compensator is one file with one class that is registered here. Whatever it does, it is kept only if it lowers the
error on images that were held out.
"""

# First, for messages list compensators in the order of their registration.
from .distillation import DistillationCompensator  # isort: skip
from .blocks import BlockCompensator
from .compensator import COMPENSATORS, Compensation, CompensationResult, Compensator
from .residual import ResidualCompensator
from .sequential import SequentialCompensator


__all__ = [
    "COMPENSATORS",
    "BlockCompensator",
    "Compensation",
    "CompensationResult",
    "Compensator",
    "DistillationCompensator",
    "ResidualCompensator",
    "SequentialCompensator",
]
