"""A report as text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.measures import MEASURES
from ..runtime.formatting import counted, format_bytes, format_count, format_milliseconds
from ..runtime.intervals import paired_interval, wilson_interval
from .data import LayerReport, ReportData
from .reach import left_out_text, targeted_text
from .structure import hidden_units, shared_factors
from .verdict import verdict


_HEADER = ("layer", "out x in", "rank", "energy", "before", "after", "kept")

_GAP = "  "

_SHORTEST_NAME = len("all encoder linears")


def format_table(report: ReportData, width: int = 100) -> str:
    """Return the report as text: a table of layers and a summary, without a trailing newline.

    Args:
        report: The report to show.
        width: The width of the terminal in columns; long layer names are shortened in the middle.
    """
    prefix = common_prefix([layer.name for layer in report.layers])
    rows = [_layer_row(layer, layer.name.removeprefix(prefix)) for layer in report.layers]
    totals = [_total_row("targeted layers", [layer for layer in report.layers if layer.targeted])]
    if not all(layer.targeted for layer in report.layers):
        totals.append(_total_row("all encoder linears", report.layers))
    lines = _aligned([_HEADER, *rows, *totals], width)
    rule = "-" * max(len(line) for line in lines)
    head, body, foot = lines[:1], lines[1 : 1 + len(rows)], lines[1 + len(rows) :]
    table = [*head, rule, *body, rule, *foot]
    if prefix:
        table.insert(0, _shortened(f"Names below {prefix.removesuffix('.')}", width))
    return "\n".join(
        [*table, "", *_summary(report), *_left_out(report, width), *_evaluation(report), *_verdict(report, width)]
    )


def dtype_change(report: ReportData) -> str:
    """Return `float16 -> float32` if the checkpoint is stored in another dtype than the original, else nothing."""
    before, after = report.dtype_on_disk_before, report.dtype_on_disk_after
    return f"{before} -> {after}" if before and after and before != after else ""


def size_text(report: ReportData) -> str:
    """Return the size that was asked for, as in `at most 22,050,664 parameters, the size of "org/name"`; else nothing."""
    count, like = (report.settings.get(name) for name in ("target_parameters", "like"))
    if not isinstance(count, int):
        return ""
    return f"at most {count:,} parameters" + (f', the size of "{like}"' if like else "")


def latency_text(report: ReportData) -> str:
    """Return the predicted latency, such as `84.2 ms -> 50.4 ms  (0.599 of the dense model; batch 1, cpu, eager)`."""
    latency = report.latency
    before, after = (format_milliseconds(latency[name]) for name in ("dense_seconds", "predicted_seconds"))
    conditions = latency.get("conditions", {})
    shown = [f"batch {conditions['batch_size']}"] if "batch_size" in conditions else []
    shown += [str(conditions[name]) for name in ("device", "dtype", "runtime") if name in conditions]
    about = "; ".join([f"{latency['predicted_share']:.3f} of the dense model", *([", ".join(shown)] if shown else [])])
    return f"{before} -> {after}  ({about})"


def _layer_row(layer: LayerReport, name: str) -> tuple[str, ...]:
    return (
        name,
        layer.shape_text(),
        layer.rank_text,
        "" if layer.kept_energy is None else f"{layer.kept_energy:.2%}",
        f"{layer.parameters_before:,}",
        f"{layer.parameters_after:,}",
        f"{layer.kept:.1%}",
    )


def count_values(layers: Sequence[LayerReport]) -> tuple[str, int, int]:
    """Return how many layers are factored, as in `"70 of 71"`, and the stored values of all before and after."""
    factored = sum(layer.rank is not None for layer in layers)
    before = sum(layer.parameters_before for layer in layers)
    return f"{factored} of {len(layers)}", before, sum(layer.parameters_after for layer in layers)


def _total_row(name: str, layers: Sequence[LayerReport]) -> tuple[str, ...]:
    factored, before, after = count_values(layers)
    kept = f"{after / before:.1%}" if before else ""
    return name, "", factored, "", f"{before:,}", f"{after:,}", kept


def _aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Align the columns: names to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(width - others, _SHORTEST_NAME))
    lines = []
    for name, *cells in rows:
        figures = [cell.rjust(size) for cell, size in zip(cells, widths[1:], strict=True)]
        lines.append(_GAP.join([_shortened(name, widths[0]).ljust(widths[0]), *figures]))
    return lines


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    # The end of a name says what kind of layer it is, the beginning where it is; both are needed.
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _summary(report: ReportData) -> list[str]:
    lines = [
        _change("Parameters of the model", report.model_parameters_before, report.model_parameters_after),
        *([_fact("  asked for", size)] if (size := size_text(report)) else []),
        _fact("  removed of the model", f"{report.removed_of_model:.2%}"),
        _fact("Targeted layers", targeted_text(report)),
        _fact("  removed of the targeted layers", f"{report.removed_of_targets:.2%}"),
        _fact("  kept of all encoder linears", f"{report.kept_of_encoder:.2%}"),
    ]
    structures = {
        "Shared first factors": shared_factors(report.layers),
        "Hidden units kept": hidden_units(report.layers),
    }
    lines += [_fact(label, text) for label, text in structures.items() if text]
    if report.flops_before is not None and report.flops_after is not None:
        lines.append(_change("FLOPs per image", report.flops_before, report.flops_after))
    if report.latency:
        lines.append(_fact("Latency, predicted", latency_text(report)))
    if report.bytes_on_disk_after is not None:
        size = _bytes(report.bytes_on_disk_before, report.bytes_on_disk_after, dtype_change(report))
        lines.append(_fact("Bytes on disk", size))
    if report.calibration:
        images, broken = report.calibration.get("num_images", 0), report.calibration.get("num_broken", 0)
        tokens = report.calibration.get("num_tokens", 0)
        left_out = f"{counted(broken, 'broken one')} left out"
        lines.append(_fact("Calibration", f"{counted(images, 'image')} ({left_out}), {counted(tokens, 'token')}"))
    if report.predicted_loss is not None:
        lines.append(_fact("Predicted loss", f"{report.predicted_loss:.4g} nats per image"))
    for step in report.compensation:
        change = f"held-out error {step['error_before']:.4g} -> {step['error_after']:.4g}"
        lines.append(_fact(f"Compensation {step['name']}", f"{change}, {'kept' if step['kept'] else 'not kept'}"))
    if report.seconds:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.seconds.items())
        lines.append(_fact("Time", phases))
    estimated = report.memory.get("estimated_bytes", {})
    if estimated:
        places = ", ".join(f"{format_bytes(size)} on the {place}" for place, size in estimated.items())
        lines.append(
            _fact("Memory, estimated", f"{places} in addition to the original, {report.memory['passes']} passes")
        )
    return lines


def _left_out(report: ReportData, width: int) -> list[str]:
    return _wrapped("Left out", left_out_text(report), width)


def _evaluation(report: ReportData) -> list[str]:
    return [] if report.evaluation is None else ["", *evaluation_lines(report.evaluation)]


def evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the lines of an evaluation, given as the fields of `EvaluationResult`, with their 95 % intervals."""
    count = evaluation.get("num_images", 0)
    lines = []
    for name in ("top1", "top5"):
        after, before = evaluation.get(name), evaluation.get(f"reference_{name}")
        if after is None:
            continue
        label = f"  top-{name.removeprefix('top')} accuracy"
        values = f"{after:.2%}" if before is None else f"{before:.2%} -> {after:.2%}"
        lines.append(_fact(label, f"{values}{_change_of_accuracy(evaluation, name)}"))
    for name, measure in MEASURES.items():
        if (value := evaluation.get(name)) is not None:
            of_images = name == "agreement" and evaluation.get("kind", "classes") == "classes"
            lines.append(
                _fact(f"  {measure.label}", f"{measure.text(value)}{_interval(value, count) if of_images else ''}")
            )
    note = "; 95% intervals in brackets" if any(" to " in line for line in lines) else ""
    return [f"Evaluation on {counted(count, 'image')}{note}", *lines]


def _change_of_accuracy(evaluation: Mapping[str, Any], name: str) -> str:
    """Return the change in brackets with its paired interval or, where there is no original, that of the accuracy."""
    after, before, count = evaluation[name], evaluation.get(f"reference_{name}"), evaluation.get("num_images", 0)
    if before is None:
        return _interval(after, count) if name == "top1" else ""
    gained, lost = evaluation.get("gained"), evaluation.get("lost")
    between = ""
    if name == "top1" and count and gained is not None and lost is not None:
        low, high = paired_interval(gained, lost, count)
        between = f": {100 * low:+.2f} to {100 * high:+.2f}"
    return f"  ({100 * (after - before):+.2f} points{between})"


def _interval(share: float, count: int) -> str:
    if not count:
        return ""
    low, high = wilson_interval(share, count)
    return f"  ({low:.2%} to {high:.2%})"


def _verdict(report: ReportData, width: int) -> list[str]:
    found = verdict(report)
    if found is None:
        return []
    return ["", *_wrapped("Verdict", str(found), width)]


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Return a fact in lines of the width; none for an empty text."""
    lines = textwrap.wrap(text, width - len(_fact("", "")))
    return [_fact("" if index else label, line) for index, line in enumerate(lines)]


def _change(label: str, before: int, after: int) -> str:
    return _fact(label, f"{format_count(before)} -> {format_count(after)}  ({after / before - 1:+.1%})")


def _bytes(before: int | None, after: int, dtypes: str) -> str:
    if before is None:
        return f"{after:,}"
    return f"{before:,} -> {after:,}  ({after / before - 1:+.1%}{f'; {dtypes}' if dtypes else ''})"


def _fact(label: str, value: str) -> str:
    return f"{label:<33}{value}"


def common_prefix(names: Sequence[str]) -> str:
    """Return the longest common prefix of the names that ends with a dot; it is never a whole name."""
    common = ""
    if len(names) > 1:
        for column in zip(*(name.split(".")[:-1] for name in names), strict=False):
            if len(set(column)) > 1:
                break
            common += f"{column[0]}."
    return common
