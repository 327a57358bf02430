"""Compensation: repair with unlabelled images what a compression has damaged.

A compensator is one class in one file, which registers itself. Whatever it does is undone if it fails the
test on held-out images.
"""

from .compensator import COMPENSATORS, CompensationResult, CompensationTask, Compensator
from .layerwise.residual import ResidualCompensator
from .layerwise.sequential import SequentialCompensator
from .training.blocks import BlockCompensator
from .training.distillation import DistillationCompensator


Compensation = CompensationTask
"""Another name of `CompensationTask`."""

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
