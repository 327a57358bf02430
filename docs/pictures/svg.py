"""Save a matplotlib figure as a single SVG file that is legible on a light and on a dark background.

Its colours are CSS variables with a value for each theme; the page that shows it selects the theme.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimum_mixrank.reporting.colours import INK, ON_DARK
from optimum_mixrank.reporting.inline_svg import css_variable, inline_svg


if TYPE_CHECKING:
    from matplotlib.figure import Figure


FOLDER = Path(__file__).parent


def save(figure: Figure, name: str, title: str, description: str) -> Path:
    """Write `name.svg` beside this file.

    Args:
        figure: A figure drawn under `picture_style` in colours of `optimum_mixrank.reporting.colours`.
        name: The name of the file without suffix.
        title: What the picture shows.
        description: The alternative text.
    """
    element = inline_svg(figure, name, title, description)
    light = "".join(f"{css_variable(colour)}:{colour};" for colour in ON_DARK)
    dark = "".join(f"{css_variable(colour)}:{other};" for colour, other in ON_DARK.items())
    style = (
        f"<style>svg{{color:{INK};{light}}}"
        f"@media (prefers-color-scheme:dark){{svg{{color:{ON_DARK[INK]};{dark}}}}}</style>"
    )
    head, body = element.split(">", 1)
    path = FOLDER / f"{name}.svg"
    width, height = (96 * size for size in figure.get_size_inches())
    head = head.replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" ', 1
    )
    path.write_text(f"{head}>{style}{body}\n", encoding="utf-8")
    return path
