"""What was done to every layer: as JSON beside the checkpoint, as a table, as a picture and as a page."""

from __future__ import annotations

from .data import REPORT_NAME, LayerReport, ReportData
from .plots import RANKS_NAME, plot_ranks
from .report import HTML_NAME, CompressionReport
from .table import format_table


__all__ = [
    "HTML_NAME",
    "RANKS_NAME",
    "REPORT_NAME",
    "CompressionReport",
    "LayerReport",
    "ReportData",
    "format_table",
    "plot_ranks",
]
