"""The estimate of `MixRankCompressor.memory_plan` beside the measured peak, each setting in a process of its own.

    python benchmarks/memory.py --output results/memory

The peak should be within 20 % of the estimate. A setting is `SHAPE:RECIPE:IMAGES:BATCH_SIZE`, and `:LIMIT` after it
for `max_memory`. `best-one-shot` is `best` without compensation. Weights and images are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from peak_memory import PeakMemory
from support import described, machine, random_images, random_model, table, write

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.runtime.formatting import format_bytes


SETTINGS = [
    "deit-s:fast:32:8",
    "deit-s:best:32:8",
    "deit-b:fast:16:8",
    "deit-b:best:16:8",
    "deit-b:best-one-shot:16:8",
    "deit-b:best-one-shot:16:8:1350MiB",
]
MARK = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shapes have, for a trial")
    parser.add_argument("--one", action="store_true", help="measure the first setting in this process")
    parser.add_argument("--output", type=Path, help="OUTPUT.md and OUTPUT.json are written")
    args = parser.parse_args()
    if args.one:
        print(MARK + json.dumps(measured(args.settings[0], args.device, args.blocks)))
        return
    if args.output is None:
        parser.error("--output is missing")
    common = ["--device", args.device, *(["--blocks", str(args.blocks)] if args.blocks else [])]
    records = []
    for setting in args.settings:
        command = [sys.executable, __file__, "--one", "--settings", setting, *common]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        [found] = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        records.append({"setting": setting, **json.loads(found)})
    rows = [row for record in records for row in rows_of(record)]
    header = ("setting", "limit", "place", "estimate", "peak", "peak / estimate", "passes")
    settings = {"random weights, image size": 224, "blocks": args.blocks or "all", "dtype": "float32"}
    lines = [described(settings, args.device), "", *table(header, rows)]
    write(args.output, {"settings": settings, "environment": machine(args.device), "rows": records}, lines)


def measured(setting: str, device: str, blocks: int | None) -> dict:
    """Compress with one setting; return the estimated and the measured peak by place, in bytes."""
    shape, recipe, images, batch_size, *limit = setting.split(":")
    model = random_model(shape, blocks=blocks).to(device)
    batches = list(random_images(int(images), model).split(int(batch_size)))
    compressor = MixRankCompressor(model)
    recipe, *one_shot = recipe.split("-", 1)
    config = MixRankConfig(recipe=recipe, compression_ratio=0.5, **({"compensation": []} if one_shot else {}))
    arguments = {"batch_size": int(batch_size), "max_memory": limit[0] if limit else None}
    plan = compressor.memory_plan(config, int(images), **arguments)
    peak = PeakMemory(model.device)
    compressor.compress(config, batches, **arguments)
    return {
        "estimated_bytes": {place: plan.peak(place) for place in ("host", "device")},
        "peak_bytes": {"host": peak.host, "device": peak.device},
        "passes": plan.passes,
        "not_counted": list(plan.not_counted),
        "seconds": compressor.report.seconds,
    }


def rows_of(record: dict) -> list[tuple]:
    """Return one row for each place of which peak and estimate are known."""
    shape, recipe, images, batch_size, *limit = record["setting"].split(":")
    name = f"{shape}, `{recipe}`, {images} images, batch size {batch_size}"
    rows = []
    for place, peak in record["peak_bytes"].items():
        estimate = record["estimated_bytes"][place]
        if peak is not None and estimate:
            figures = (format_bytes(estimate), format_bytes(peak), f"{peak / estimate:.2f}")
            rows.append((name, limit[0] if limit else "none", place, *figures, record["passes"]))
    return rows


if __name__ == "__main__":
    main()
