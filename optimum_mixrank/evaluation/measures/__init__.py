"""How far the output of a compressed model is from the original's, each measure for the kinds of outputs that it suits."""

from .comparison import Comparison
from .measure import MEASURES, Measure, PairMeasure


__all__ = ["MEASURES", "Comparison", "Measure", "PairMeasure"]
