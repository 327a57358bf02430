"""One sentence on a result: good, usable or broken, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.measures import MEASURES
from ..runtime.formatting import counted
from .data import ReportData


FEW_IMAGES = 256
"""Calibration images below which more of them are likely to help."""

TOO_FEW_TO_TELL = 32
"""Compared images below which a share of them says little: of 13 that agree, the 95 % interval begins at 77 %."""


@dataclass(frozen=True)
class Verdict:
    """What to think of a result.

    Attributes:
        word: `"good"`, `"usable"` or `"broken"`.
        reason: What was measured.
        advice: What to do next; empty for a good result.
    """

    word: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}{f'. Next: {self.advice}' if self.advice else ''}"


def verdict(report: ReportData) -> Verdict | None:
    """Return the verdict on a result, or None if it was compared with the original on no image.

    What decides is the first measure that does of those that suit the output; see `evaluation.measures`.
    """
    found = report.fidelity
    if not found:
        return None
    images = counted(found["num_images"], f"{'held-out' if found['held_out'] else 'calibration'} image")
    measured = {name: measure for name, measure in MEASURES.items() if name in found}
    if any(found[name] is None for name in measured):
        return Verdict("broken", f"NaN or Inf on {images}", "compress in float32 (dtype='float32')")
    deciding = next((name for name, measure in measured.items() if measure.good is not None), None)
    if deciding is None:
        return None
    word, reason = measured[deciding].word(found[deciding]), measured[deciding].sentence(found[deciding], images)
    reason = ", ".join([reason, *(each.brief(found[name]) for name, each in measured.items() if name != deciding)])
    return Verdict(word, reason, _advice(report, word == "good"))


def _advice(report: ReportData, is_good: bool) -> str:
    compared = report.fidelity["num_images"]
    little = f"more images, since {compared} {'says' if compared == 1 else 'say'} little"
    if compared < TOO_FEW_TO_TELL:
        return little
    if is_good:
        return ""
    settings, images = report.settings, report.calibration.get("num_images", 0)
    steps = settings.get("compensation") or []
    found = []
    if not steps or settings.get("metric") != "kfac":
        found.append("recipe 'best'")
    elif images < FEW_IMAGES:
        found.append("more calibration images")
    elif "distillation" not in steps:
        found.append("recipe 'distilled' with a few thousand images")
    return ", or ".join([*found, _larger_budget(settings)])


def _larger_budget(settings: Mapping[str, Any]) -> str:
    """Return how to ask for less compression, in terms of the setting that was given."""
    if settings.get("target_parameters") is not None:
        return "a larger size"
    if settings.get("target_latency") is not None:
        return "a larger target_latency"
    ratio = settings.get("compression_ratio")
    return f"a ratio below {ratio:g}" if isinstance(ratio, float) else "a smaller ratio"
