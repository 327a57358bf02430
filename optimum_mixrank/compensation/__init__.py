"""Compensation: repair what a compression has broken, with unlabelled images.

A compensator is one file with one class that is registered here. Whatever it does, it is kept only if it lowers the
error on images that were held out.
"""

from .compensator import COMPENSATORS, CompensationResult, CompensationTask, Compensator
from .layerwise.residual import ResidualCompensator
from .layerwise.sequential import SequentialCompensator
from .training.blocks import BlockCompensator
from .training.distillation import DistillationCompensator


Compensation = CompensationTask
"""What `CompensationTask` was called before."""

__all__ = [
    "COMPENSATORS",
    "BlockCompensator",
    "Compensation",
    "CompensationResult",
    "CompensationTask",
    "Compensator",
    "DistillationCompensator",
    "ResidualCompensator",
    "SequentialCompensator",
]
