"""Everything that a GPU has to show, in less than eight minutes, safe to run at any time.

    python benchmarks/gpu.py --output benchmarks/results/gpu
    python benchmarks/gpu.py --device cpu --tiny --output /tmp/trial      # to try the script itself
    python benchmarks/gpu.py --table benchmarks/results/gpu.json          # the tables again

measures whether CUDA agrees with the CPU (float32, without TF32), whether a saved model is the same when it is opened
again, `torch.compile`, what calibration costs beside a plain pass, decomposition, the latency of dense and compressed
models in three precisions, eager and compiled, and, with two GPUs, compression by two processes over NCCL. Weights and
images are random; nothing is downloaded, and no setting of the GPU is changed.

Every part runs in a process of its own and has its own limit of time, after which the process is ended. What it has found
until then is in OUTPUT.json already; an error is recorded and stops no other part. OUTPUT.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support import machine, table


KEPT = 0.4
"""Share of the encoder's linear layers that compressed models keep."""

LAYOUTS = ("factors", "pivoted")

PARTS = {
    "agreement": 60.0,
    "reload": 30.0,
    "calibration": 45.0,
    "decomposition": 60.0,
    "compile": 60.0,
    "nccl": 40.0,
    "latency": 180.0,
}
"""The most seconds that each part may take; the last gets what is left. `gpu_parts.py` says what they do."""

LIMIT = 450.0
"""Seconds for all parts together."""

GRACE = 5.0
"""Seconds that a process has to end after it was asked to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts together")
    parser.add_argument("--output", type=Path, help="OUTPUT.json and OUTPUT.md are written")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of an earlier run")
    # How this script starts itself for one part.
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table is not None:
        print("\n".join(lines_of(json.loads(args.table.read_text()))))
        return
    if args.output is None:
        parser.error("--output is missing: name the files without their ending.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the script without one.")
    if args.part is not None:
        run_part(args)
    else:
        run_all(args)


def run_part(args: argparse.Namespace) -> None:
    """Measure one part in this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    import gpu_parts

    gpu_parts.PARTS[args.part](gpu_parts.Setting(args.device, args.tiny, args.until, args.output))


def run_all(args: argparse.Namespace) -> None:
    """Measure all parts, one after the other, and write the files after each of them."""
    until = time.monotonic() + args.limit
    record: dict[str, Any] = {
        "settings": {"device": args.device, "tiny": args.tiny, "kept of the encoder's weights": KEPT, "TF32": "off"},
        "environment": environment(args.device),
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            # A trial shows whether a part runs, on a machine that may be busy.
            most = math.inf if args.tiny else PARTS[name]
            seconds = min(most, until - time.monotonic() - GRACE)
            skipped = {"status": "no time was left", "figures": {}}
            record["parts"][name] = skipped if seconds <= 0 else measured(args, name, seconds, Path(folder))
            record["seconds"] = args.limit - (until - time.monotonic())
            save(args.output, record)
            print(f"{name}: {record['parts'][name]['status']}", flush=True)
    print("\n".join(lines_of(record)))


def save(output: Path, record: Mapping[str, Any]) -> None:
    """Write the record as JSON and its tables as Markdown."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text("\n".join(lines_of(record)) + "\n")


def measured(args: argparse.Namespace, name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Start a process for one part and return what it has found, whatever becomes of the process."""
    figures, log = folder / f"{name}.json", folder / f"{name}.log"
    options = ["--device", args.device, *(["--tiny"] if args.tiny else []), "--output", str(figures)]
    until = time.time() + seconds - GRACE
    command = [sys.executable, str(Path(__file__)), "--part", name, "--until", str(until), *options]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "ended after its time"
        finally:
            _end(process)
    found: dict[str, Any] = {"status": status, "seconds": time.monotonic() - start}
    found["figures"] = json.loads(figures.read_text()) if figures.exists() else {}
    if status == "failed":
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        found["error"] = lines[-1][:500] if lines else f"exit code {process.returncode}"
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, with those that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue


def environment(device: str) -> dict[str, Any]:
    """Return versions and hardware, and what others leave of the GPU's memory."""
    found = machine(device)
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"GPUs": torch.cuda.device_count(), "free memory": free, "memory": total, "CUDA": torch.version.cuda}
    return found


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """Return the tables of a record as Markdown."""
    settings, here = record["settings"], record["environment"]
    where = (
        f"{here['device']}, PyTorch {here['torch']}, Transformers {here['transformers']}, {here['processor']}, "
        f"{here['cores']} cores; float32 without TF32; {record.get('seconds', 0):.0f} s in all."
    )
    lines = [("A trial with tiny models, whose times mean nothing: " if settings["tiny"] else "") + where]
    for name, part in record["parts"].items():
        latency = name == "latency"
        lines += ["", f"### {name}", "", *_status(part)]
        if part["figures"]:
            lines += _latency_table(part["figures"]) if latency else _table(part["figures"])
    return lines


def _status(part: Mapping[str, Any]) -> list[str]:
    error = f": {part['error']}" if "error" in part else ""
    return [] if part["status"] == "done" else [f"This part is not complete ({part['status']}{error}).", ""]


def _table(figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, value in figures.items():
        values = value if isinstance(value, dict) else {"": value}
        rows.append((name, "; ".join(f"{key} {_number(each)}".strip() for key, each in values.items())))
    return table(("what", "found"), rows)


def _latency_table(figures: Mapping[str, Any]) -> list[str]:
    ideal = {name.split(", ")[0]: value for name, value in figures.items() if name.endswith(", ideal")}
    rows = []
    for name, value in figures.items():
        if name.endswith(", ideal"):
            continue
        shape, mode, dtype, size = name.split(", ")
        cells = (shape, mode, dtype, size.removeprefix("batch "))
        if "error" in value:
            rows.append((*cells, value["error"], *[""] * (2 * len(LAYOUTS))))
            continue
        row = [*cells, f"{value['dense ms']:.2f} ms"]
        for layout in LAYOUTS:
            each = value[layout]
            row += [f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})", f"{ideal[shape][layout]:.2f}"]
        rows.append(tuple(row))
    heads = [head for layout in LAYOUTS for head in (f"`{layout}` / dense", "multiply-adds")]
    return table(("shape", "mode", "dtype", "batch", "dense", *heads), rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
