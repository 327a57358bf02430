"""One sentence on a result: good, usable or broken, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass

from .data import ReportData


GOOD, USABLE = 0.95, 0.85
"""Agreement with the original from which a result is good or usable.

Where both were measured, top-1 fell by about one point at an agreement of 95 %, by two to four at 90 %, and by ten at 80 %.
"""

GOOD_ERROR, USABLE_ERROR = 0.05, 0.2
"""The same for the relative error of features, for models that predict no class."""

FEW_IMAGES = 256


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
    """Return the verdict on a result, or None if it was compared with the original on no image."""
    found = report.fidelity
    if not found:
        return None
    images = f"{found['num_images']:,} {'held-out' if found['held_out'] else 'calibration'} images"
    if "agreement" in found:
        share, kl = found["agreement"], found["kl"]
        word = "good" if share >= GOOD else "usable" if share >= USABLE else "broken"
        reason = f"the same class as the original on {share:.1%} of {images}"
        reason += "" if kl is None else f", KL {kl:.2g} nats"
        is_finite = kl is not None
    else:
        error = found["feature_error"]
        is_finite = error is not None
        word = "broken" if error is None or error > USABLE_ERROR else "usable" if error > GOOD_ERROR else "good"
        reason = "" if error is None else f"a relative error of the output of {error:.2g} on {images}"
    if not is_finite:
        return Verdict("broken", f"NaN or Inf on {images}", "compress in float32 (dtype='float32')")
    return Verdict(word, reason, "" if word == "good" else _advice(report))


def _advice(report: ReportData) -> str:
    settings, images = report.settings, report.calibration.get("num_images", 0)
    steps = settings.get("compensation") or []
    found = []
    if not steps or settings.get("metric") != "kfac":
        found.append("recipe 'best'")
    elif images < FEW_IMAGES:
        found.append("more calibration images")
    elif "distillation" not in steps:
        found.append("recipe 'distilled' with a few thousand images")
    ratio = settings.get("compression_ratio")
    if settings.get("target_parameters") is not None:
        found.append("a larger size")
        return ", or ".join(found)
    found.append(f"a ratio below {ratio:g}" if isinstance(ratio, float) else "a smaller ratio")
    return ", or ".join(found)
