"""The report of a compression: its data and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.replacing import HTML_NAME as HTML_NAME
from .data import ReportData, file_in, write_text
from .html import render_html


class CompressionReport(ReportData):
    """The report of a compression; `ReportData` describes its fields."""

    def to_html(self, others: Sequence[CompressionReport] = (), theme: str | None = None) -> str:
        """Return the report as one HTML page with pictures, which loads nothing and runs no script.

        Args:
            others: Reports of other compressions of the same model; the pictures over parameters show their measured
                loss and accuracy too.
            theme: `"light"` or `"dark"`; default: the reader's system setting.

        Raises:
            ValueError: if the theme is unknown.
        """
        return render_html(self, others, theme)

    def save_html(self, path: str | Path, others: Sequence[CompressionReport] = (), theme: str | None = None) -> Path:
        """Write the page that `to_html` returns, completely or not at all.

        Args:
            path: A file, or an existing folder, in which the file is called `report.html`.
            others: See `to_html`.
            theme: See `to_html`.

        Returns:
            The path of the file.

        Raises:
            ValueError: if the theme is unknown.
        """
        return write_text(file_in(path, HTML_NAME), self.to_html(others, theme))
