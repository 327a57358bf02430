"""Pictures as SVG elements of a page, in its colours and with an alternative text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .colours import INK, ON_DARK
from .plots import STYLE


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS_PER_POINT = 96 / 72

_URL = re.compile(r"url\(#([\w-]+)\)")

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


def css_variable(colour: str) -> str:
    """Return the name of the CSS variable for a colour of `colours`, whose value depends on the theme."""
    return f"--c-{colour.removeprefix('#')}"


@contextmanager
def picture_style() -> Iterator[None]:
    """Draw and save the same picture whatever the user's matplotlib settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Text stays text, so that it can be searched and copied.
        matplotlib.rcParams.update({**STYLE, "svg.fonttype": "none"})
        yield


def inline_svg(
    figure: Figure, name: str, title: str, description: str, tooltips: Mapping[str, str] | None = None
) -> str:
    """Return a figure as an `svg` element that loads nothing.

    Args:
        figure: A figure drawn under `picture_style` in colours of `colours`.
        name: A prefix for its ids, unique in the page.
        title: What the picture shows.
        description: The alternative text.
        tooltips: Tooltips by the `gid` of an artist.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    root = ElementTree.fromstring(svg)
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    referred = {*_URL.findall(svg), *re.findall(r'href="#([\w-]+)"', svg)}
    for element in root.iter():
        _clean(element, name, referred, tooltips or {})
    texts = {"title": title, "desc": description}
    for position, (tag, text) in enumerate(texts.items()):
        child = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        child.text = text
        root.insert(position, child)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": " ".join(f"{name}-{tag}" for tag in texts),
        # The width at which letters have the size that they were drawn with.
        "style": f"--width: {width * _PIXELS_PER_POINT:.0f}px; aspect-ratio: {width:.2f} / {height:.2f}",
        "fill": "currentColor",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, name: str, referred: set[str], tooltips: Mapping[str, str]) -> None:
    """Make ids unique to the picture, and replace namespaces and fixed colours."""
    for child in list(element):
        if _local(child.tag) in ("metadata", "style"):
            element.remove(child)
    element.tag = _local(element.tag)
    identity = element.attrib.pop("id", "")
    if identity and identity in tooltips:
        title = ElementTree.Element("title")
        title.text = tooltips[identity]
        element.insert(0, title)
    attributes = {}
    for key, value in element.attrib.items():
        if _local(key) == "href":
            attributes["href"] = f"#{name}-{value.removeprefix('#')}"
        else:
            value = _URL.sub(rf"url(#{name}-\1)", value)
            attributes[_local(key)] = _COLOUR.sub(lambda match: _themed(match[0]), value)
    if identity in referred:
        attributes["id"] = f"{name}-{identity}"
    element.attrib = attributes


def _themed(colour: str) -> str:
    if colour == INK:
        return "currentColor"
    return f"var({css_variable(colour)})" if colour in ON_DARK else colour


def _local(name: str) -> str:
    """Return a name without its namespace, which an `svg` element in HTML does not need."""
    return name.rpartition("}")[2]
