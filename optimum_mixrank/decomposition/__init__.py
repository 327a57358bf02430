"""Decomposition of linear layers: tensors in, tensors out.

A metric says how the error of a layer is measured and which calibration statistics it needs; from them it derives the
best approximations of all ranks at once (`Decomposition`). A new metric is one file with one class that is registered
here.
"""

from .anchored import anchored_weight
from .diagonal import DiagonalMetric
from .factorization import Decomposition, balance, corrected_bias, decompose_by_input, root_of_covariance
from .kfac import KfacMetric
from .mean_input import MeanInputMetric
from .metric import METRICS, Metric
from .pivoting import Pivoting, pivot_rows
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
    "Pivoting",
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
