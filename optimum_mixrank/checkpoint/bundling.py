"""Collect definitions of this package, with all that they use of it, as the source of one file that does without it."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


Definition = tuple[str, str]
"""Names of a module and of what it defines."""


@dataclass
class _Module:
    """A module of this package, read as source.

    Attributes:
        definitions: Source by name, in the order of the file; names that are assigned together have the same.
        uses: For each definition the names that occur in it.
        external: For each name that is imported from other packages the statement that imports it.
        internal: For each name that is imported from this package where it is defined.
    """

    definitions: dict[str, str] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    external: dict[str, str] = field(default_factory=dict)
    internal: dict[str, Definition] = field(default_factory=dict)


def bundle(roots: Iterable[Definition], substitutes: Mapping[Definition, str] | None = None) -> str:
    """Return source with some definitions of this package and all that they use, without imports of this package.

    Args:
        roots: What to collect.
        substitutes: Import statements to use in place of definitions.

    Raises:
        ValueError: if two definitions have the same name, or the source imports in a way that cannot be resolved.
    """
    modules: dict[str, _Module] = {}
    imports: dict[str, str] = {}
    wanted: dict[str, set[str]] = {}
    waiting = list(roots)
    while waiting:
        name, what = waiting.pop()
        if substitutes is not None and (name, what) in substitutes:
            _add(imports, what, substitutes[name, what])
            continue
        if name not in modules:
            modules[name] = _read(name)
        module = modules[name]
        if what in wanted.setdefault(name, set()):
            continue
        wanted[name].add(what)
        for used in module.uses[what]:
            if used in module.definitions:
                waiting.append((name, used))
            elif used in module.internal:
                waiting.append(module.internal[used])
            elif used in module.external:
                _add(imports, used, module.external[used])
    defined = [
        (name, each) for name in _in_order(modules) for each in modules[name].definitions if each in wanted[name]
    ]
    names = dict(imports)
    for name, each in defined:
        _add(names, each, name)
    parts = dict.fromkeys(modules[name].definitions[each] for name, each in defined)
    lines = sorted(set(imports.values()), key=lambda line: (line.startswith("from"), line))
    return "from __future__ import annotations\n\n" + "\n".join(lines) + "\n\n\n" + "\n\n\n".join(parts) + "\n"


def _add(names: dict[str, str], name: str, meaning: str) -> None:
    if names.setdefault(name, meaning) != meaning:
        raise ValueError(f"{name!r} has two meanings in the files that are put together; rename one of them.")


def _in_order(modules: Mapping[str, _Module]) -> list[str]:
    """Return the modules in the order in which Python would execute them."""
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        for other in dict.fromkeys(module for module, _ in modules[name].internal.values()):
            if other in modules and other not in found:
                visit(other)
        found[name] = None

    for name in modules:
        if name not in found:
            visit(name)
    return list(found)


def _read(name: str) -> _Module:
    text = inspect.getsource(importlib.import_module(name))
    lines, found = text.splitlines(), _Module()
    body = ast.parse(text).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            _read_import(found, name, statement)
            continue
        names = _defined(statement)
        if names and any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(statement)):
            raise ValueError(f"{names[0]!r} of {name} imports from the package when it is called; import at the top.")
        source = _source(lines, statement, following)
        for each in names:
            found.definitions[each] = source
            found.uses[each] = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return found


def _read_import(found: _Module, name: str, statement: ast.Import | ast.ImportFrom) -> None:
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return
    for alias in statement.names:
        local = alias.asname or alias.name.partition(".")[0]
        renamed = f" as {alias.asname}" if alias.asname else ""
        if isinstance(statement, ast.Import):
            found.external[local] = f"import {alias.name}{renamed}"
        elif not statement.level:
            found.external[local] = f"from {statement.module} import {alias.name}{renamed}"
        else:
            package = ".".join(name.split(".")[: -statement.level])
            found.internal[local] = (f"{package}.{statement.module}" if statement.module else package, alias.name)


def _defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _source(lines: list[str], statement: ast.stmt, following: ast.stmt | None) -> str:
    """Return the source of a definition, with the comment before it and, of a constant, the docstring after it."""
    decorators = getattr(statement, "decorator_list", [])
    start, end = min([statement.lineno, *(each.lineno for each in decorators)]) - 1, statement.end_lineno
    is_constant = isinstance(statement, ast.Assign | ast.AnnAssign)
    if is_constant and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        end = following.end_lineno
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return "\n".join(lines[start:end])
