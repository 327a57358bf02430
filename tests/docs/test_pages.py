"""What the pages say about the package is true: messages, fields, options, public names, pictures."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from docs.blocks import PAGES, ROOT

import optimum_mixrank
from optimum_mixrank import MixRankConfig
from optimum_mixrank.checkpoint.recipes import RECIPES


OF_OTHER_LIBRARIES = (
    # Transformers; tests/test_round_trip.py provokes it.
    "You set ignore_mismatched_sizes to False, thus raising an error.",
    # PyTorch, where the system kills a process that decodes images.
    "DataLoader worker (pid …) is killed by signal: …",
)
WRITTEN_BY_THE_COMPRESSOR = {"quant_method", "rank_map", "layout_version", "library_version"}
TROUBLES = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"].read_text(encoding="utf-8"), re.MULTILINE)


@cache
def messages():
    """Return every string in the package's source, with a NUL for each formatted value."""
    return [
        _text(node)
        for file in (ROOT / "optimum_mixrank").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]


def _text(node):
    if isinstance(node, ast.Constant):
        return node.value.replace("`", "")
    return "".join(_text(value) if isinstance(value, ast.Constant) else "\0" for value in node.values)


@pytest.mark.parametrize("quoted", [trouble for trouble in TROUBLES if trouble not in OF_OTHER_LIBRARIES])
def test_quoted_messages_occur_in_the_package(quoted):
    # A gap stands for a value and whatever the source puts around it.
    pattern = re.compile(".*?\0.*?".join(map(re.escape, quoted.strip("…").split("…"))), re.DOTALL)
    assert any(pattern.search(message) for message in messages()), quoted


def test_every_field_is_explained_with_its_default():
    table = PAGES["configuration.md"].read_text(encoding="utf-8")
    rows = {}
    for names, defaults in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", table, re.MULTILINE):
        names, defaults = re.findall(r"`(\w+)`", names), defaults.strip().split(", ")
        rows.update(zip(names, defaults if len(defaults) == len(names) else defaults * len(names), strict=True))
    config, by_recipe = MixRankConfig(), set(RECIPES["best"])
    for field in dataclasses.fields(config):
        if field.name in WRITTEN_BY_THE_COMPRESSOR:
            continue
        default = rows[field.name]
        assert (
            default == "recipe"
            if field.name in by_recipe
            else ast.literal_eval(default.strip("`")) == getattr(config, field.name)
        )


def test_the_table_of_recipes_is_complete():
    text = PAGES["configuration.md"].read_text(encoding="utf-8")
    for name, fields in RECIPES.items():
        (row,) = re.findall(rf'^\| `"{name}"` \| (.*) \|$', text, re.MULTILINE)
        cells = [cell.strip().strip("`") for cell in row.split("|")]
        assert cells == [
            *(fields[key] for key in ("metric", "allocation", "layout")),
            *(str(fields[key]).replace("'", '"') for key in ("structures", "compensation")),
            *(str(fields[key]) for key in ("probed_images", "min_rank_ratio", "num_samples")),
            str(fields["closed_form_images"] or "all"),
        ]


def test_names_of_the_api_are_imported_from_where_it_says():
    sections = re.split(r"^## `(.*)`$", PAGES["api.md"].read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    documented = {}
    for module, text in zip(sections[::2], sections[1::2], strict=True):
        paths = [path.rpartition(".") for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
        documented[module] = {name for _, _, name in paths}
        for home, _, name in paths:
            assert getattr(importlib.import_module(module), name) is vars(importlib.import_module(home))[name]
    assert set(optimum_mixrank.__all__) - {"__version__"} == documented["optimum_mixrank"]


def test_pictures_are_drawn_by_their_script(tmp_path):
    """Draw the pictures that need no calibration; the pages show only pictures that a script draws."""
    scripts = tmp_path / "docs" / "pictures"
    scripts.mkdir(parents=True)
    for file in (ROOT / "docs" / "pictures").glob("*.py"):
        (scripts / file.name).write_bytes(file.read_bytes())
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    names = ["factorization", "pivoted", "compensation", "results"]
    subprocess.run([sys.executable, str(scripts / "draw.py"), *names], check=True, capture_output=True)
    for name in names:
        drawn = (scripts / f"{name}.svg").read_text(encoding="utf-8")
        # Both themes are supported, and no other file is loaded.
        assert "prefers-color-scheme:dark" in drawn and not re.search(r"(?:href|src)=\"(?!#)", drawn)
        assert _words(drawn) == _words((ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8"))
    shown = {
        name
        for page in PAGES.values()
        for name in re.findall(r"pictures/(\w+)\.svg", page.read_text(encoding="utf-8"))
    }
    assert shown == {path.stem for path in (ROOT / "docs" / "pictures").glob("*.svg")}


def _words(svg):
    return re.findall(r"<text[^>]*>([^<]+)", svg)


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {Path(page).name for page in re.findall(r": (\S+\.md)$", text, re.MULTILINE)}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= pages
