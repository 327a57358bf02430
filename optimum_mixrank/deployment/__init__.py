"""Models for other runtimes: writing them, running them, and whether they still compute what their source does."""

from __future__ import annotations

import importlib


_PUBLIC = {
    "ExportResult": "export",
    "ExportedModel": "target",
    "Limits": "verify",
    "Verification": "verify",
    "strip_metadata": "onnx_runtime",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    # Runtimes are imported when they are used.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
