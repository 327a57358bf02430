"""The house: rooms in their order, from the ground up. A room imports from those before it, never from those after it."""

import ast
from functools import cache
from pathlib import Path

import pytest

import optimum_mixrank


PACKAGE = Path(optimum_mixrank.__file__).parent

ROOMS = [
    "runtime",  # knows no model and no method: processes, files, hooks, precision, logging
    "decomposition",  # pure mathematics: tensors in, factors out
    "checkpoint",  # what a compressed checkpoint is: all that loading needs, and saving
    "allocation",  # pure mathematics: losses and costs in, ranks out
    "calibration",  # images to batches to statistics
    "compensation",  # repair of what compression has broken
    "evaluation",  # what was lost, and what it costs to run
    "deployment",  # models for other runtimes: writing, running and checking them
    "reporting",  # how it is shown
    "pipeline",  # the order of things: `MixRankCompressor` and its steps
    "commands",  # `optimum-cli mixrank …`: parse, call the public API, print
]

PUBLIC_MODULES = ["profile"]
"""Beside the rooms: modules that give public names a short path, and hold nothing else."""

MARKERS = ["__init__.py", "__main__.py", "py.typed"]


@cache
def modules():
    """Every module of the package, as a syntax tree, by its name below the package; `""` is the package itself."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (ast.parse(file.read_text(encoding="utf-8")), parts[-1] == "__init__")
    return found


@cache
def imports(name):
    """Modules of the package that a module imports, anywhere in it: lazily or for type checkers too."""
    tree, is_package = modules()[name]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {_below(alias.name) for alias in node.names if _is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and not _is_ours(node.module):
                continue
            base = _below(node.module) if node.level == 0 else _resolve(name, is_package, node)
            submodules = {f"{base}.{alias.name}".strip(".") for alias in node.names} & modules().keys()
            found |= submodules or {base}
    return found - {name}


def _is_ours(module):
    return module.split(".")[0] == "optimum_mixrank"


def _below(module):
    return module.removeprefix("optimum_mixrank").removeprefix(".")


def _resolve(name, is_package, node):
    parts = name.split(".") if name else []
    around = parts if is_package else parts[:-1]
    return ".".join([*around[: len(around) - node.level + 1], *([node.module] if node.module else [])])


def floor(module):
    """On which floor a module stands; those that only give out public names, the package's own first, stand on top."""
    room = module.split(".")[0]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def test_every_entry_of_the_package_is_a_room():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, *(f"{module}.py" for module in PUBLIC_MODULES), *MARKERS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is(room):
    assert ast.get_docstring(modules()[room][0])


def test_imports_point_downwards():
    upward = [f"{name} imports {other}" for name in modules() for other in imports(name) if floor(other) > floor(name)]
    assert not upward, "\n".join(upward)


def test_there_is_no_import_cycle():
    finished = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in finished:
            for other in sorted(imports(name)):
                visit(other, [*path, name])
            finished.add(name)

    for name in modules():
        visit(name, [])


def test_mathematics_knows_neither_models_nor_files():
    for name in modules():
        if name.split(".")[0] in ("decomposition", "allocation"):
            named = {
                part
                for node in ast.walk(modules()[name][0])
                for part in ([node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else [])
                + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            }
            foreign = {"transformers", "datasets", "accelerate", "safetensors", "pathlib", "huggingface_hub"}
            assert not {part.split(".")[0] for part in named} & foreign, name
