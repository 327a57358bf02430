"""How much of the model was targeted, and what was left out, in words."""

from __future__ import annotations

from .data import ReportData


_LEAST = 0.001
"""Kinds of parameters that are a smaller share of the model are added up."""


def targeted_text(report: ReportData, digits: int = 1) -> str:
    """Return the share of the targeted layers, as in `31.2% of the model, 78.0% of what images reach`."""
    text = f"{report.targeted_of_model:.{digits}%} of the model"
    of_images = report.targeted_of_images
    if of_images is None or report.reach.get("images") == report.model_parameters_before:
        return text
    return f"{text}, {of_images:.{digits}%} of the part that images reach"


def left_out_text(report: ReportData, digits: int = 1) -> str:
    """Return what was left out, as in `language and text layers 54.1%, embeddings 8.3%`; empty if it is unknown."""
    whole = report.model_parameters_before
    shares = {kind: count / whole for kind, count in report.reach.get("left_out", {}).items()}
    shown = {kind: share for kind, share in shares.items() if share >= _LEAST}
    rest = sum(shares.values()) - sum(shown.values())
    if rest > 0 and shown:
        shown["all else"] = rest
    return ", ".join(f"{kind} {max(share, 10.0 ** (-digits - 2)):.{digits}%}" for kind, share in shown.items())
