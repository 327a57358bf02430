"""Definitions of several modules are put into one file in the order in which they can be executed."""

import importlib
import sys
import textwrap

import pytest

from optimum_mixrank.checkpoint.bundling import bundle


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a package and return the bundle of one definition, executed."""
    name = f"bundled_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def write(**modules):
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return name

    yield write
    for module in [each for each in sys.modules if each.split(".")[0] == name]:
        del sys.modules[module]


def executed(source):
    values = {"__name__": "generated"}
    exec(compile(source, "generated", "exec"), values)
    return values


def test_what_is_used_comes_along_and_nothing_else(package):
    name = package(
        low="""
            import math
            import json

            # Why it is three.
            SIDES = 3
            \"\"\"Number of sides.\"\"\"

            UNUSED = json.dumps(4)

            def area(side: float) -> float:
                return math.sqrt(SIDES) / 4 * side**2
        """,
        high="""
            from __future__ import annotations

            from typing import TYPE_CHECKING
            from functools import cache

            from .low import SIDES, area

            if TYPE_CHECKING:
                from .nowhere import Nothing

            class Triangle:
                sides = SIDES

                @staticmethod
                @cache
                def area(side: Nothing) -> float:
                    return area(side)
        """,
    )
    source = bundle([(f"{name}.high", "Triangle")])
    values = executed(source)
    assert values["Triangle"].area(2.0) == pytest.approx(3**0.5)
    assert "UNUSED" not in source and "json" not in source and name not in source
    assert '# Why it is three.\nSIDES = 3\n"""Number of sides."""' in source


def test_definitions_can_be_replaced(package):
    name = package(
        low="def log(text):\n    raise SystemExit\n",
        high="from .low import log\n\ndef call():\n    return log(4)\n",
    )
    source = bundle([(f"{name}.high", "call")], {(f"{name}.low", "log"): "from math import sqrt as log"})
    assert executed(source)["call"]() == 2


def test_two_meanings_of_a_name_are_refused(package):
    name = package(
        low="_LIMIT = 1\n\ndef low():\n    return _LIMIT\n",
        high="from .low import low\n\n_LIMIT = 2\n\ndef call():\n    return low() + _LIMIT\n",
        other="from math import sqrt as low\n\ndef other():\n    return low(4)\n",
    )
    with pytest.raises(ValueError, match="'_LIMIT' has two meanings"):
        bundle([(f"{name}.high", "call")])
    with pytest.raises(ValueError, match="'low' has two meanings"):
        bundle([(f"{name}.low", "low"), (f"{name}.other", "other")])


def test_imports_inside_of_functions_are_refused(package):
    name = package(low="VALUE = 1\n", high="def call():\n    from .low import VALUE\n    return VALUE\n")
    with pytest.raises(ValueError, match="'call' of .* imports from the package when it is called; import at the top"):
        bundle([(f"{name}.high", "call")])
