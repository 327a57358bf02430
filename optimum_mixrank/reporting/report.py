"""The report of a compression: its data, and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .data import ReportData, file_in, write_text
from .html import render_html


HTML_NAME = "report.html"


class CompressionReport(ReportData):
    """The report of a compression: its fields, which `ReportData` describes, and the page that shows them."""

    def to_html(self, others: Sequence[CompressionReport] = (), theme: str | None = None) -> str:
        """The report as one HTML page with pictures, to look at in a browser; it loads nothing and runs no script.

        Args:
            others: Reports of other compressions of the same model; their measured loss and accuracy stand beside this
                one's in the pictures over parameters.
            theme: `"light"` or `"dark"`; default: as the reader's system is set.

        Raises:
            ValueError: for another theme.
        """
        return render_html(self, others, theme)

    def save_html(self, path: str | Path, others: Sequence[CompressionReport] = (), theme: str | None = None) -> Path:
        """Write the page of `to_html`, complete or not at all.

        Args:
            path: A file, or an existing folder in which it is called `report.html`.
            others: See `to_html`.
            theme: See `to_html`.

        Returns:
            The file.

        Raises:
            ValueError: for another theme.
        """
        return write_text(file_in(path, HTML_NAME), self.to_html(others, theme))
