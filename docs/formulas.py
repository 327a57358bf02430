"""A hook of MkDocs that writes formulas as MathML, which browsers show without a script, a font or a network.

In pages they are LaTeX, `$…$` or `$$` on lines of their own, as GitHub shows it too.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert


_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace what `pymdownx.arithmatex` has marked."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    is_block = match[1] == "div"
    formula = convert(html.unescape(match[2]).strip(), display="block" if is_block else "inline")
    return f'<div class="formula">{formula}</div>' if is_block else formula
