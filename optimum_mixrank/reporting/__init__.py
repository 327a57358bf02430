"""What was done to every layer: as JSON beside the checkpoint, as a table, as a picture, as a page."""

from __future__ import annotations

from .plots import plot_ranks
from .report import HTML_NAME, RANKS_NAME, REPORT_NAME, CompressionReport, LayerReport
from .table import format_table


__all__ = ["HTML_NAME", "RANKS_NAME", "REPORT_NAME", "CompressionReport", "LayerReport", "format_table", "plot_ranks"]
