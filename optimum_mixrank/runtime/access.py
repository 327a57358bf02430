"""How repositories on the Hub are reached that a configuration names, without a place for secrets in the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any


_ACCESS: ContextVar[Mapping[str, Any]] = ContextVar("access", default=MappingProxyType({}))

_NAMES = ("token", "cache_dir", "local_files_only", "proxies")
"""What holds for every repository; a revision belongs to one."""


def common_access(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of `from_pretrained` that hold for every repository."""
    return {name: arguments[name] for name in _NAMES if arguments.get(name)}


@contextmanager
def hub_reached_by(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Reach repositories in this context with those of the arguments of `from_pretrained` that hold for every one.

    What an outer context says holds on where the arguments say nothing.
    """
    before = _ACCESS.set({**_ACCESS.get(), **common_access(arguments)})
    try:
        yield
    finally:
        _ACCESS.reset(before)


def hub_access() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that hold for every repository in this context."""
    return dict(_ACCESS.get())
