"""Decomposition of linear layers: tensors in, tensors out.

A metric defines how the error of a layer is measured, which calibration statistics that takes and, for all ranks at
once, the best approximations (`Decomposition`). A new metric is one file with one registered class.
"""

from .anchored import anchored_weight
from .diagonal import DiagonalMetric
from .factorization import Decomposition, balance, corrected_bias, decompose_by_input, root_of_covariance
from .kfac import KfacMetric
from .mean_input import MeanInputMetric
from .metric import METRICS, Metric
from .pivoting import pivot_rows
from .second_moment import SecondMomentMetric
from .statistics import LayerStatistics, Statistic
from .svd import SvdMetric
from .two_sided import OutputFisher, damped, decompose_two_sided


__all__ = [
    "METRICS",
    "Decomposition",
    "DiagonalMetric",
    "KfacMetric",
    "LayerStatistics",
    "MeanInputMetric",
    "Metric",
    "OutputFisher",
    "SecondMomentMetric",
    "Statistic",
    "SvdMetric",
    "anchored_weight",
    "balance",
    "corrected_bias",
    "damped",
    "decompose_by_input",
    "decompose_two_sided",
    "pivot_rows",
    "root_of_covariance",
]
