"""Models for other runtimes: writing them, running them, and whether they still compute what their source does."""

from .export import ExportResult
from .onnx_runtime import strip_metadata
from .target import ExportedModel
from .verify import Limits, Verification


__all__ = ["ExportResult", "ExportedModel", "Limits", "Verification", "strip_metadata"]
