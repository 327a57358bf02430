"""What the pages say about the package is true: messages, fields, options, public names, pictures."""

import ast
import dataclasses
import importlib.util
import json
import re
import runpy
import shutil
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


@cache
def public_paths():
    """Return the documented names by the module that they are imported from: each as home and name."""
    sections = re.split(r"^## `(.*)`$", PAGES["api.md"].read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        module: [path.rpartition(".")[::2] for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
        for module, text in zip(sections[::2], sections[1::2], strict=True)
    }


def test_names_of_the_api_are_imported_from_where_it_says():
    for module, paths in public_paths().items():
        for home, name in paths:
            assert getattr(importlib.import_module(module), name) is vars(importlib.import_module(home))[name]
    assert set(optimum_mixrank.__all__) - {"__version__"} == {name for _, name in public_paths()["optimum_mixrank"]}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").rglob("*.py")), ids=lambda script: script.name)
def test_examples_use_public_names(script):
    imported = [
        (node.module, each.name)
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimum_mixrank")
        for each in node.names
    ]
    public = {(module, name) for module, paths in public_paths().items() for _, name in paths}
    assert not set(imported) - public


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


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_a_screen_of_1366_pixels(page):
    fences = re.findall(r"^ *```\w*\n(.*?)^ *```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert not [line for text in fences for line in text.splitlines() if len(line) > 104]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_have_at_most_124_characters(page):
    assert not [line for line in _prose(PAGES[page].read_text(encoding="utf-8")) if len(line) > 124]


def test_long_lines_of_prose_are_found():
    long = "word " * 30
    exempt = [f"| {long}|", f"```\n{long}\n```", f"$$\n{long}\n$$", f"{long}$x$", f"<!-- table: a -->\n{long}"]
    for text in (*exempt, f"[word]({'a' * 130})", f"# {long}"):
        assert not [line for line in _prose(f"{text}\n") if len(line) > 124], text
    for text in (long, f"- {long}", f"```\ncode\n```\n{long}", f"<!-- table: a -->\n<!-- end of table -->\n{long}"):
        assert [line for line in _prose(f"{text}\n") if len(line) > 124], text


def _prose(text):
    """Return the lines that are wrapped: no code, tables, headings and formulas, and links without their targets."""
    text = re.sub(r"^( *)```.*?^\1```|^\$\$$.*?^\$\$$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- table: .*?(?:<!-- end of table -->|\Z)", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#")) and "$" not in line]
    return [re.sub(r"\]\([^()\s]*\)", "]", line) for line in lines]


def test_tables_are_those_of_the_records():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in script["PAGES"]]
    assert [script["with_tables"](text) for text in texts] == texts
    assert sum(text.count("<!-- table: ") for text in texts) == len(script["TABLES"])


def test_tables_of_times_show_what_was_recorded(tmp_path):
    """With a record of int8 its models are shown in float32 and int8, with one of latency the two in every runtime."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    shutil.copy(ROOT / "benchmarks" / "results" / "vit_s_distilled.json", tmp_path)
    name = json.loads((tmp_path / "vit_s_distilled.json").read_text())["model_name"]
    runs = [
        {"runtime": "PyTorch", "batch_size": 8, "model": model, "median": seconds}
        for model, seconds in (("dense", 0.8), ("best, 40 %", 0.4))
    ]
    cases = [{"name": name, "models": {"dense": {}, "best, 40 %": {}}, "runs": runs}]
    machine = {"torch": "2", "processor": "a processor"}
    record = {"environment": machine, "settings": {"repeats": 6}, "cases": cases}
    (tmp_path / "latency.json").write_text(json.dumps(record))
    assert "| 1.21 G | 88.1 % | 50.0 (0.50) |" in "\n".join(script["results_table"](tmp_path))
    rows = [
        {
            **{"model": model, "method": method, "bytes": 2_000_000, "flops": 2_000_000_000},
            **{"top1": 0.5, "milliseconds": {"8": 8 * milliseconds}},
        }
        for method, milliseconds in (("PyTorch, float32", 10), ("ONNX Runtime, dynamic int8", 5), ("another", 1))
        for model in ("dense", "30 % kept")
    ]
    record = {"machine": machine, "settings": {"repetitions": 6}, "rows": rows}
    (tmp_path / "int8.json").write_text(json.dumps(record))
    table = script["results_table"](tmp_path)
    assert "| 30 % kept, ONNX Runtime, int8 | 2.0 MB | 2.00 G | 50.0 % | 5.0 (0.50) |" in table
    assert len(table) == 8 and "a processor" in table[-1]
    # As on the page about deployment, ratios are those within a turn where they were recorded.
    rows[3]["time_ratio"] = {"8": [0.43, 0.4, 0.5]}
    (tmp_path / "int8.json").write_text(json.dumps(record))
    assert "5.0 (0.43) |" in "\n".join(script["results_table"](tmp_path))


def test_the_address_of_the_repository_is_one():
    repository = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for file in (ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "CITATION.cff"):
        found = re.findall(r"https://github.com/\w[\w-]*/optimum-mixrank", file.read_text(encoding="utf-8"))
        assert set(found) == {repository}, file


def test_links_of_the_readme_are_absolute_on_pypi():
    script = runpy.run_path(str(ROOT / "hatch_build.py")) if importlib.util.find_spec("hatchling") else None
    if script is None:
        pytest.skip("hatchling, which builds the package, is not installed; .ci/wheel.sh looks at the wheel")
    text = script["with_absolute_links"](PAGES["README.md"].read_text(encoding="utf-8"), "https://host/a/b")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert "https://host/a/b/raw/main/docs/pictures/results.svg" in links
    assert "https://host/a/b/blob/main/docs/performance.md#latency" in links


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {Path(page).name for page in re.findall(r": (\S+\.md)$", text, re.MULTILINE)}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= pages
