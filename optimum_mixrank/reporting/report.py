"""The report of a compression: its data and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..checkpoint.replacing import HTML_NAME as HTML_NAME
from .data import ReportData, file_in, write_text
from .html import render_html
from .table import format_table
from .verdict import verdict


class CompressionReport(ReportData):
    """The report of a compression; `ReportData` describes its fields."""

    def __repr__(self) -> str:
        found = verdict(self)
        parts = [
            f"{self.model_name or 'a model'}: {self.model_parameters_before:,} -> {self.model_parameters_after:,} values",
            f"{sum(layer.rank is not None for layer in self.layers)} of {len(self.layers)} layers factored",
            *([] if found is None else [str(found)]),
        ]
        return f"<{type(self).__name__} {'; '.join(parts)}>"

    def __str__(self) -> str:
        return format_table(self)

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own so that neither changes the other's style."""
        return f'<iframe srcdoc="{escape(self.to_html())}" style="width: 100%; height: 40rem; border: 0"></iframe>'

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
