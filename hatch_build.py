"""The README as PyPI shows it: links to files of the repository become absolute, which they need not be elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


BRANCH = "main"
_LINK = re.compile(r"(!?\[[^\]]*\]\()(?!#|[a-z]+:)([^)\s]+)(?=\))")


def with_absolute_links(text: str, repository: str) -> str:
    """Return Markdown whose relative links lead to the repository, pictures to their bytes and pages to their view."""

    def absolute(match: re.Match[str]) -> str:
        view = "raw" if match[1].startswith("!") else "blob"
        return f"{match[1]}{repository}/{view}/{BRANCH}/{match[2]}"

    return _LINK.sub(absolute, text)


class AbsoluteLinks(MetadataHookInterface):
    """Takes the address from `[project.urls]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
