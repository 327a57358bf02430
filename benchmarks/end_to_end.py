"""Compress models of known shapes from end to end: seconds by phase, peak memory, and scaling over processes.

    python benchmarks/end_to_end.py --shapes deit-b --recipes fast best --output results/end_to_end
    python benchmarks/end_to_end.py --shapes deit-b --recipes fast --device cuda --output results/end_to_end_gpu
    python benchmarks/end_to_end.py --shapes deit-s --recipes best --processes 1 2 --output results/scaling

Weights and images are random, which does for timing. With `--processes`, this file starts itself by `accelerate launch`,
every process with the same number of threads (strong scaling: the work stays, its share shrinks). `--paper-gpus` adds a
model on paper, no measurement: the time for N processes from the measured parts of one, as

    parallel parts / N + serial parts + 2 (N - 1) / N * bytes that are exchanged / bandwidth

with `--bandwidth` in GB/s between GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from support import SHAPES, described, machine, random_images, random_model, table, write

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.distributed import disconnect, find_processes
from optimum_mixrank.memory_plan import decomposition_bytes, format_bytes, statistics_bytes
from optimum_mixrank.memory_probe import probe_model
from optimum_mixrank.targets import encoder_linears


PHASES = ("calibrate", "decompose", "allocate", "profile", "factorize", "compensate")
PARALLEL = ("calibrate", "decompose", "factorize", "compensate")
"""Phases whose images or layers are shared out over processes."""

MARK = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["deit-b"], choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=["fast", "best"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shapes have, for a trial")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=0, help="of each process; default: cores / most processes")
    parser.add_argument("--paper-gpus", type=int, nargs="*", default=[])
    parser.add_argument("--bandwidth", type=float, help="GB/s between GPUs, for --paper-gpus")
    parser.add_argument("--one", action="store_true", help="measure the first shape and recipe in this process")
    parser.add_argument("--output", type=Path, help="OUTPUT.md and OUTPUT.json are written")
    args = parser.parse_args()
    if args.one:
        found = measured(args)
        if int(os.environ.get("RANK", "0")) == 0:
            print(MARK + json.dumps(found), flush=True)
        disconnect()
        return
    if args.output is None or (args.paper_gpus and not args.bandwidth):
        parser.error("--output is missing" if args.output is None else "--bandwidth is missing")
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(args.processes))
    records = [
        {"shape": shape, "recipe": recipe, "processes": processes, **launched(args, shape, recipe, processes, threads)}
        for shape in args.shapes
        for recipe in args.recipes
        for processes in args.processes
    ]
    torch.set_num_threads(threads)
    settings = {
        "random weights, image size": args.image_size,
        "images": args.images,
        "batch size": args.batch_size,
        "ratio": args.ratio,
        "blocks": args.blocks or "all",
        "threads of each process": threads,
        "dtype": "float32",
    }
    lines = [described(settings, args.device), "", *measurements(records)]
    if args.paper_gpus:
        lines += ["", *on_paper(records, args.paper_gpus, args.bandwidth)]
    write(args.output, {"settings": settings, "environment": machine(args.device), "rows": records}, lines)


def launched(args: argparse.Namespace, shape: str, recipe: str, processes: int, threads: int) -> dict:
    """Measure in new processes."""
    own = ["--one", "--shapes", shape, "--recipes", recipe, "--device", args.device]
    for name in ("images", "batch_size", "image_size", "ratio", "blocks"):
        value = getattr(args, name)
        own += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    command = [sys.executable, __file__, *own]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if processes > 1:
        # The one way to several processes on one machine; without GPUs they are connected by gloo.
        options = {
            "num_processes": processes,
            "num_machines": 1,
            "mixed_precision": "no",
            "dynamo_backend": "no",
            "num_cpu_threads_per_process": threads,
            "main_process_port": 0,
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command = [*launcher, *(f"--{name}={value}" for name, value in options.items()), *command[1:]]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    [found] = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(found)


def measured(args: argparse.Namespace) -> dict:
    """Seconds and bytes of one compression."""
    model = random_model(args.shapes[0], args.image_size, args.blocks)
    batches = list(random_images(args.images, model).split(args.batch_size))
    config = MixRankConfig(recipe=args.recipes[0], compression_ratio=args.ratio)
    processes = find_processes()
    compressor = MixRankCompressor(model.to(args.device if processes.is_alone else processes.device))
    targets = encoder_linears(model)
    metric = METRICS.create(config.metric)
    required = {target.name: metric.required_statistics(*target.shape) for target in targets}
    layers = probe_model(model, targets, False).layers
    start = time.perf_counter()
    compressor.compress(config, batches, batch_size=args.batch_size)
    seconds = time.perf_counter() - start
    assert compressor.report is not None  # `compress` has made one
    return {
        "total": seconds,
        "seconds": compressor.report.seconds,
        "memory": compressor.report.memory,
        "exchanged_bytes": {
            "statistics": statistics_bytes(layers, required),
            "decompositions": sum(decomposition_bytes(target.shape, config.layout) for target in targets),
        },
    }


def measurements(records: list[dict]) -> list[str]:
    """A table of what was measured; speed-ups are over one process of the same setting."""
    alone = {(row["shape"], row["recipe"]): row["total"] for row in records if row["processes"] == 1}
    rows = []
    for row in records:
        one = alone.get((row["shape"], row["recipe"]))
        peaks = [peak for peak in row["memory"]["peak_bytes"].values() if peak is not None]
        rows.append(
            (
                row["shape"],
                f"`{row['recipe']}`",
                row["processes"],
                *(f"{row['seconds'][phase]:.1f} s" for phase in PHASES),
                f"{row['total']:.1f} s",
                "" if one is None else f"{one / row['total']:.2f}",
                format_bytes(max(peaks)) if peaks else "not measured",
            )
        )
    return table(("shape", "recipe", "processes", *PHASES, "in all", "speed-up", "peak beside the model"), rows)


def on_paper(records: list[dict], counts: list[int], bandwidth: float) -> list[str]:
    """A table of times from the model of this file's description."""
    rows = []
    for row in records:
        if row["processes"] != 1:
            continue
        parallel = sum(row["seconds"][phase] for phase in PARALLEL)
        serial = row["total"] - parallel
        exchanged = sum(row["exchanged_bytes"].values())
        for count in counts:
            wire = 2 * (count - 1) / count * exchanged / (bandwidth * 1e9)
            total = parallel / count + serial + wire
            rows.append(
                (
                    row["shape"],
                    f"`{row['recipe']}`",
                    count,
                    f"{parallel / count:.1f} s",
                    f"{serial:.1f} s",
                    f"{wire:.2f} s",
                    f"{total:.1f} s",
                    f"{row['total'] / total:.1f}",
                )
            )
    header = ("shape", "recipe", "processes", "parallel parts", "serial parts", "exchange", "in all", "speed-up")
    return [
        f"A model on paper, no measurement: measured parts of one process, {bandwidth:g} GB/s between processes.",
        "",
        *table(header, rows),
    ]


if __name__ == "__main__":
    main()
