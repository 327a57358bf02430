"""The tables of results in the README and on pages of the documentation, from the records in `benchmarks/results`.

    python benchmarks/readme_table.py          # writes the tables into the pages
    python benchmarks/readme_table.py --print  # prints them

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. "results" is about the real ViT-S: its sizes and
accuracies come from `vit_s_distilled.json`; where there is a record of `benchmarks/int8.py` (`int8.json`) or of
`benchmarks/latency.py` (`latency.json`) on that model, its times are shown, and with the former its 8-bit files too.
"vit_s_int8" and "latency" are all of these two records,
"shipped" is what `examples/quickstart.py` gives (`quickstart.json`, a copy of its report), "int8" what
`examples/int8.py --record` writes (`int8_shipped.json`).
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_mixrank.runtime.formatting import format_count


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DENSE = "dense"
SHOWN = {
    "PyTorch, float32": "PyTorch, float32",
    "ONNX Runtime, float32": "ONNX Runtime, float32",
    "ONNX Runtime, dynamic int8": "ONNX Runtime, int8",
    "OpenVINO, static int8": "OpenVINO, int8",
}
"""Methods of `benchmarks/int8.py` that the README shows, in this order, and what it calls them."""

Record = dict[str, Any]


@dataclass
class Row:
    """A model in a runtime; times are in milliseconds per image, by batch size.

    Attributes:
        shares: Medians of the ratios to the dense model's times in the same turn, which do not drift with the machine, by
            batch size; empty if the record holds none.
    """

    name: str
    num_bytes: int
    flops: int
    top1: float
    times: dict[int, float] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)


def load(name: str, results: Path = RESULTS) -> Record | None:
    """Return a record, or None if it was not measured."""
    file = results / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def results_table(results: Path = RESULTS) -> list[str]:
    """Return the lines of the table about the ViT-S, and of what it was measured on."""
    report, int8, latency = (load(name, results) for name in ("vit_s_distilled", "int8", "latency"))
    assert report is not None
    if int8 is not None:
        rows, machine, what = _int8_rows(int8), int8["machine"], int8["settings"]
        caption = f"Medians of {what['repetitions']} repetitions in turns"
    elif latency is not None and (case := _case(report, latency)) is not None:
        rows, machine, what = _latency_rows(report, case), latency["environment"], latency["settings"]
        caption = f"Medians of {what['repeats']} repetitions in turns"
    else:
        rows, machine, caption = _report_rows(report), None, ""
    sizes = sorted({size for row in rows for size in row.times})
    header = ["", "on disk", "FLOPs per image", "top-1"]
    header += [f"ms per image, batch {size}" for size in sizes]
    cells = [[row.name, _megabytes(row.num_bytes), format_count(row.flops), _percent(row.top1, 1)] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        line += [_time(row, size, rows[0]) if size in row.times else "" for size in sizes]
    conditions = [f"Distilled on unlabelled images, one seed; top-1 on {report['evaluation']['num_images']:,} images."]
    if machine is not None:
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime") if name in machine)
        conditions.append(
            f"{caption}, one thread on {machine.get('processor', 'x86-64')}, {versions}; in brackets, the median "
            "ratio to the first row's time in the same turn."
        )
    return [*_table(header, cells), "", " ".join(conditions)]


def shipped_table(results: Path = RESULTS) -> list[str]:
    """Return the lines of the table about the model of the repository."""
    report = load("quickstart", results)
    assert report is not None
    evaluation = report["evaluation"]
    points = 100 * (evaluation["top1"] - evaluation["reference_top1"])
    changes = [
        ("parameters", "model_parameters", "{:,}"),
        ("bytes on disk", "bytes_on_disk", "{:,}"),
        ("FLOPs per image", "flops", "{:,}"),
    ]
    cells = []
    for label, key, form in changes:
        before, after = report[f"{key}_before"], report[f"{key}_after"]
        cells.append([label, form.format(before), form.format(after), _signed(f"{100 * (after / before - 1):+.1f} %")])
    top1 = [_percent(evaluation[name], 2) for name in ("reference_top1", "top1")]
    cells.append(["top-1", *top1, _signed(f"{points:+.2f} points")])
    agreement, kl = _percent(evaluation["agreement"], 2), f"KL {evaluation['kl']:.4f} nats"
    cells.append(["same class as the original", "", agreement, kl])
    return _table(["", "original", "compressed", ""], cells)


def int8_table(results: Path = RESULTS) -> list[str]:
    """Return the lines of the table about 8-bit files of the model of the repository."""
    record = load("int8_shipped", results)
    assert record is not None
    versions = record["environment"]
    names = {
        "original": "original, float32",
        "compressed": "compressed, float32",
        "torchao int8": f"torchao {versions['torchao']}, int8 weights",
        "onnx": f"ONNX Runtime {versions['onnxruntime']}, float32",
        "onnx int8": f"ONNX Runtime {versions['onnxruntime']}, int8",
    }
    cells = []
    for name, label in names.items():
        row = record["models"][name]
        compared = ["", ""] if name == "original" else [_percent(row["agreement"], 2), f"{row['kl']:.4f} nats"]
        cells.append([label, f"{row['bytes']:,}", _percent(row["top1"], 2), *compared])
    return _table(["", "bytes on disk", "top-1", "agreement with the original", "KL"], cells)


def vit_s_int8_table(results: Path = RESULTS) -> list[str]:
    """Return the lines of the table about 8-bit files of the ViT-S."""
    record = load("int8", results)
    return [] if record is None else _script("int8")["rendered"](record)


def latency_table(results: Path = RESULTS) -> list[str]:
    """Return the lines of the tables of latency, one for each dense model."""
    record = load("latency", results)
    return [] if record is None else _script("latency")["tables"](record)


def _script(name: str) -> dict[str, Any]:
    """Return what a benchmark defines; it imports its neighbours."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="benchmark")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


TABLES: dict[str, Callable[[], list[str]]] = {
    "results": results_table,
    "shipped": shipped_table,
    "int8": int8_table,
    "vit_s_int8": vit_s_int8_table,
    "latency": latency_table,
}
PAGES = ("README.md", "docs/deployment.md", "docs/performance.md")


def with_tables(text: str) -> str:
    """Return a page with its tables written anew."""

    def rendered(match: re.Match[str]) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end of table -->)", rendered, text, flags=re.DOTALL)


def _report_rows(report: Record) -> list[Row]:
    evaluation = report["evaluation"]
    return [
        Row("original", report["bytes_on_disk_before"], report["flops_before"], evaluation["reference_top1"]),
        Row("compressed", report["bytes_on_disk_after"], report["flops_after"], evaluation["top1"]),
    ]


def _latency_rows(report: Record, case: Record) -> list[Row]:
    """Return the rows of dense and first compressed model in each runtime."""
    original, compressed = _report_rows(report)
    labels = list(case["models"])[:2]
    rows = []
    for runtime in dict.fromkeys(run["runtime"] for run in case["runs"]):
        for label, known in zip(labels, (original, compressed), strict=False):
            runs = [run for run in case["runs"] if (run["runtime"], run["model"]) == (runtime, label)]
            times = {run["batch_size"]: 1000 * run["median"] / run["batch_size"] for run in runs}
            rows.append(Row(f"{known.name}, {runtime}", known.num_bytes, known.flops, known.top1, times))
    return rows


def _int8_rows(record: Record) -> list[Row]:
    rows = []
    for method, label in SHOWN.items():
        for row in record["rows"]:
            if row["method"] == method:
                name = "original" if row["model"] == DENSE else row["model"]
                times = {int(size): value / int(size) for size, value in row["milliseconds"].items()}
                shares = {int(size): median for size, (median, _, _) in row.get("time_ratio", {}).items()}
                rows.append(Row(f"{name}, {label}", row["bytes"], row["flops"], row["top1"], times, shares))
    return rows


def _case(report: Record, record: Record) -> Record | None:
    return next((case for case in record["cases"] if case["name"] == report["model_name"]), None)


def _time(row: Row, size: int, first: Row) -> str:
    share = row.shares.get(size, row.times[size] / first.times[size])
    return f"{row.times[size]:.1f} ({share:.2f})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables and write nothing")
    args = parser.parse_args()
    if args.only_print:
        for name, make in TABLES.items():
            print("\n".join([f"{name}:", *make(), ""]))
        return
    for page in PAGES:
        file = ROOT / page
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
